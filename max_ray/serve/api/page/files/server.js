// The view of the running server, from GET /v1/server once a second while it is seen.

import { ServerError, getJson } from './api.js';
import { byId, bytes, count, el, seconds, svg } from './dom.js';
import { errorBox } from './message.js';

const EVERY_MS = 1000;
const MAX_SAMPLES = 120;
const WINDOW = 4; // samples that a rate is taken over
const PHASES = { queued: 'waits', preempted: 'waits again', prefill: 'prefill', decode: 'decode' };

let timer = null;
let isShown = false;
let samples = [];
let parts = null;
let latest = null;
let seen = new Map(); // tag of a request -> its phases so far, with seconds

export function showServer() {
  if (isShown) return;
  isShown = true;
  parts ??= build();
  poll();
}

export function hideServer() {
  isShown = false;
  clearTimeout(timer);
}

const redraw = () => latest && isShown && drawBlocks(latest);
addEventListener('theme', redraw);
addEventListener('resize', redraw);
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', redraw);
document.addEventListener('visibilitychange', () => isShown && !document.hidden && poll());

function ofModel() { // several models: each has a view of its own
  const { options, value } = byId('model');
  return options.length > 1 ? `?model=${encodeURIComponent(value)}` : '';
}

async function poll() {
  clearTimeout(timer);
  if (!isShown || document.hidden) return;
  try {
    latest = await getJson(`v1/server${ofModel()}`);
    parts.problem.replaceChildren();
    show(latest);
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    parts.problem.replaceChildren(errorBox(error.message, poll));
    if (error.status === 401) return;
  }
  clearTimeout(timer);
  timer = setTimeout(poll, EVERY_MS);
}

// The frame, built once; `show` fills it.

function build() {
  const tile = (title) => {
    const made = { value: el('strong', {}, '–'), unit: el('span', {}), note: el('p', { className: 'muted' }), extra: el('div', { className: 'extra' }) };
    made.node = el('section', { className: 'tile' }, el('h2', {}, title), el('p', { className: 'big' }, made.value, made.unit), made.extra, made.note);
    return made;
  };
  const made = {
    problem: el('div'),
    generated: tile('Generated'), prompt: tile('Prompt'), batch: tile('Batch'), queue: tile('Queue'), cache: tile('KV cache'),
    canvas: el('canvas', { role: 'img' }), blockNote: el('p', { className: 'muted' }),
    latency: el('tbody'), requests: el('div'), replicas: el('tbody'), facts: el('dl'),
  };
  const table = (heads, body) => el('div', { className: 'table', tabIndex: 0 }, el('table', {}, el('thead', {}, el('tr', {}, heads.map((head) => el('th', { scope: 'col' }, head)))), body));
  const panel = (title, className, ...children) => el('section', { className: `panel ${className}` }, el('h2', {}, title), ...children);
  byId('server-view').replaceChildren(
    made.problem,
    el('div', { className: 'tiles' }, [made.generated, made.prompt, made.batch, made.queue, made.cache].map(({ node }) => node)),
    el('div', { className: 'panels' },
      panel('KV blocks', 'wide-panel', made.canvas, made.blockNote),
      panel('Latency since the start', '', table(['', 'p50', 'p95', 'p99'], made.latency)),
      panel('Requests', 'full', made.requests),
      panel('Replicas and worker groups', 'full', table(['Replica', 'State', 'Running', 'Waiting', 'KV blocks', 'Generated', 'Preempted', 'Recovered', 'Group', 'Workers'], made.replicas)),
      panel('Model', 'full', made.facts)),
  );
  return made;
}

function show(server) {
  const total = (name) => server.replicas.reduce((sum, replica) => sum + replica[name], 0);
  const sample = { time: server.time };
  for (const name of ['generated_tokens', 'prompt_tokens', 'steps', 'running', 'queued', 'num_used_blocks']) sample[name] = total(name);
  samples = [...samples, sample].slice(-MAX_SAMPLES);
  showTiles(server, total);
  drawBlocks(server);
  parts.latency.replaceChildren(latencyRow('First token', server.latency.time_to_first_token_seconds), latencyRow('Between tokens', server.latency.inter_token_latency_seconds));
  showRequests(server);
  parts.replicas.replaceChildren(...server.replicas.map((replica) => replicaRow(replica, server)));
  showFacts(server);
}

function fillTile(tile, value, unit, note, extra) {
  tile.value.textContent = value;
  tile.unit.textContent = unit;
  tile.note.textContent = note;
  tile.extra.replaceChildren(extra);
}

function showTiles(server, total) {
  const { limits, replicas } = server;
  const places = limits.max_batch_size * replicas.length;
  const waitingPlaces = limits.max_queued_requests * replicas.length;
  const blocks = total('num_blocks');
  const used = total('num_used_blocks');
  const perStep = change('generated_tokens') / change('steps');
  fillTile(parts.generated, perSecond('generated_tokens'), 'tokens/s', `${count(total('generated_tokens'))} since the start`, sparkline('generated_tokens'));
  fillTile(parts.prompt, perSecond('prompt_tokens'), 'tokens/s', `${count(total('prompt_tokens'))} since the start, ${count(total('prefix_hit_tokens'))} from the prefix cache`, sparkline('prompt_tokens'));
  fillTile(parts.batch, count(total('running')), `of ${count(places)}`, Number.isFinite(perStep) && perStep > 0 ? `${perStep.toFixed(1)} tokens a step` : 'idle', meter(total('running') / places, 'Requests in the batch', 1));
  const oldest = Math.max(...replicas.map((replica) => replica.oldest_waiting_s));
  fillTile(parts.queue, count(total('queued')), `of ${count(waitingPlaces)}`, total('queued') ? `the oldest waits ${seconds(oldest)}` : `${count(total('rejected'))} refused since the start`, meter(total('queued') / waitingPlaces, 'Requests that wait'));
  const tokens = server.kv_cache ? `${count(blocks)} blocks of ${server.kv_cache.page_size} tokens` : 'this model keeps nothing';
  fillTile(parts.cache, blocks ? `${((used / blocks) * 100).toFixed(used / blocks < 0.1 ? 1 : 0)} %` : '–', 'in use', tokens, meter(blocks ? used / blocks : 0, 'KV blocks in use'));
}

function change(name, from = Math.max(0, samples.length - 1 - WINDOW), to = samples.length - 1) {
  return Math.max(0, samples[to][name] - samples[from][name]); // a replica that was replaced begins at 0 again
}

function rate(name, to = samples.length - 1) {
  const from = Math.max(0, to - WINDOW);
  const time = samples[to].time - samples[from].time;
  return time > 0 ? change(name, from, to) / time : 0;
}

function perSecond(name) {
  const value = rate(name);
  return value > 0 && value < 10 ? value.toFixed(1) : count(value);
}

function sparkline(name) {
  const values = samples.map((_, i) => rate(name, i));
  const top = Math.max(1, ...values);
  const x = (i) => (200 * (MAX_SAMPLES - values.length + i)) / (MAX_SAMPLES - 1);
  const points = values.map((value, i) => `${x(i).toFixed(1)},${(36 - (34 * value) / top).toFixed(1)}`).join(' ');
  const line = svg('polyline', { points });
  const area = svg('polygon', { points: `${x(0).toFixed(1)},37 ${points} 200,37` });
  return svg('svg', { viewBox: '0 0 200 38', preserveAspectRatio: 'none', class: 'spark', role: 'img', 'aria-label': `The last two minutes, up to ${count(top)} tokens/s` }, area, line);
}

function meter(share, label, high = 0.9) {
  const bar = el('i');
  bar.style.width = `${Math.min(1, share || 0) * 100}%`;
  const percent = Math.round(Math.min(1, share || 0) * 100);
  return el('div', { className: `meter${share > high ? ' high' : ''}`, role: 'meter', 'aria-label': label, 'aria-valuenow': percent, 'aria-valuemin': 0, 'aria-valuemax': 100 }, bar);
}

// KV blocks: a cell for some neighbouring blocks, in the colour of the request that has most of them.

const hue = (index) => (170 + index * 137.5) % 360;
const colour = (index, strength = 1) => `hsl(${hue(index)} 62% 50% / ${strength})`;

function drawBlocks({ kv_cache: cache, requests, replicas, replica }) {
  const { canvas } = parts;
  canvas.hidden = !cache;
  if (!cache) return parts.blockNote.replaceChildren('This model has no KV cache.');
  const width = canvas.parentElement.clientWidth - 36;
  const cells = cache.used.length;
  const size = Math.max(9, Math.min(24, Math.sqrt((width * 170) / cells)));
  const columns = Math.floor(width / size);
  const rows = Math.ceil(cells / columns);
  const scale = devicePixelRatio || 1;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(rows * size * scale);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${rows * size}px`;
  const pen = canvas.getContext('2d');
  pen.scale(scale, scale);
  const free = getComputedStyle(canvas).getPropertyValue('outline-color');
  for (let i = 0; i < cells; i += 1) {
    const [x, y] = [(i % columns) * size, Math.floor(i / columns) * size];
    const blocks = Math.min(cache.blocks_per_cell, cache.num_blocks - i * cache.blocks_per_cell);
    box(pen, x, y, size, free);
    if (cache.request[i] >= 0) box(pen, x, y, size, colour(cache.request[i], 0.25 + (0.75 * cache.used[i]) / blocks));
    if (cache.shared[i]) dot(pen, x, y, size);
  }
  const used = cache.used.reduce((sum, one) => sum + one, 0);
  const shared = cache.shared.reduce((sum, one) => sum + one, 0);
  canvas.setAttribute('aria-label', `${count(used)} of ${count(cache.num_blocks)} blocks are held by ${requests.length} requests`);
  const per = cache.blocks_per_cell > 1 ? `A cell is ${cache.blocks_per_cell} blocks; its strength is how many are in use. ` : '';
  const which = replicas.length > 1 ? `Of replica ${short(replica)} alone. ` : '';
  parts.blockNote.replaceChildren(`${which}${per}A colour is a request; a dot marks blocks that requests share (${count(shared)}). Cached prefixes that no request holds count as free.`);
}

function box(pen, x, y, size, style) {
  pen.fillStyle = style;
  pen.beginPath();
  pen.roundRect(x + 1, y + 1, size - 2, size - 2, 3);
  pen.fill();
}

function dot(pen, x, y, size) {
  pen.fillStyle = '#fff';
  pen.beginPath();
  pen.arc(x + size / 2, y + size / 2, size / 7, 0, 7);
  pen.fill();
}

function latencyRow(name, { count: number, ...quantiles }) {
  return el('tr', {}, el('th', { scope: 'row', title: `${count(number)} observations` }, name), ['p50', 'p95', 'p99'].map((key) => el('td', {}, seconds(quantiles[key]))));
}

// Requests. Phases are what this page saw, to a second.

function showRequests({ requests, num_requests: number, replicas, replica }) {
  const known = new Map();
  for (const request of requests) known.set(request.tag, follow(seen.get(request.tag) ?? [], request));
  seen = known;
  if (!requests.length) return parts.requests.replaceChildren(el('p', { className: 'muted' }, 'No request at the moment.'));
  const notes = [];
  if (number > requests.length) notes.push(`${count(number - requests.length)} more are not listed. `);
  if (replicas.length > 1) notes.push(`These are the requests of replica ${short(replica)}; each replica knows its own.`);
  const heads = ['Request', 'Phase', 'Age', 'Phases', 'Prompt', 'Generated', 'Blocks'];
  const table = el('table', {}, el('thead', {}, el('tr', {}, heads.map((head) => el('th', { scope: 'col' }, head)))), el('tbody', {}, requests.map(requestRow)));
  return parts.requests.replaceChildren(el('div', { className: 'table', tabIndex: 0 }, table), el('p', { className: 'muted' }, notes));
}

function follow(phases, { phase, age_s: age }) {
  const last = phases.at(-1);
  if (last?.phase === phase) return [...phases.slice(0, -1), { ...last, until: age }];
  return [...phases, { phase, from: last?.until ?? 0, until: age }];
}

function requestRow(request) {
  const mark = el('span', { className: 'mark' });
  mark.style.background = request.num_blocks ? colour(request.index) : 'transparent';
  const bar = el('div', { className: 'phases' }, seen.get(request.tag).map(({ phase, from, until }) => {
    const part = el('i', { className: phase, title: `${PHASES[phase]} ${seconds(until - from)}` });
    part.style.flexGrow = 1 + 100 * (until - from);
    return part;
  }));
  const cached = request.cached_tokens ? ` (${count(request.cached_tokens)} cached)` : '';
  const progress = request.phase === 'prefill' ? `${count(request.processed_tokens)} of ` : '';
  return el('tr', {},
    el('td', {}, mark, el('code', {}, request.tag)), el('td', {}, el('span', { className: `chip ${request.phase}` }, PHASES[request.phase])), el('td', {}, seconds(request.age_s)),
    el('td', {}, bar), el('td', {}, `${progress}${count(request.prompt_tokens)}${cached}`), el('td', {}, count(request.generated_tokens)), el('td', {}, count(request.num_blocks)));
}

const short = (id) => id.slice(0, 8);

function replicaRow(replica, server) {
  const { group } = replica;
  const isSelf = replica.replica === server.replica;
  return el('tr', {},
    el('td', { title: replica.replica }, el('code', {}, short(replica.replica)), isSelf && server.replicas.length > 1 ? ' (answers)' : ''),
    el('td', {}, el('span', { className: `chip ${replica.healthy ? 'good' : 'bad'}` }, replica.healthy ? 'healthy' : 'recovering')),
    ...[replica.running, replica.queued].map((value) => el('td', {}, count(value))), el('td', {}, `${count(replica.num_used_blocks)} / ${count(replica.num_blocks)}`),
    ...[replica.generated_tokens, replica.preemptions, replica.recoveries].map((value) => el('td', {}, count(value))),
    el('td', {}, group ? `${group.group_id}, epoch ${group.epoch}` : '–'), el('td', {}, group ? `${group.num_workers} on ${group.device}` : '–'));
}

function showFacts({ model, limits, version, uptime_s: uptime }) {
  const weights = [model.family, model.format, model.encoding, model.size_bytes ? bytes(model.size_bytes) : ''].filter(Boolean).join(', ');
  const facts = [
    ['Name', model.id], ['Weights', weights || '–'], ['Longest sequence', `${count(model.max_model_len)} tokens`], ['Tokens a step', `${count(limits.max_batch_input_tokens)} at most`],
    ['Chunked prefill', limits.enable_chunked_prefill ? 'on' : 'off'], ['Prefix cache', limits.enable_prefix_caching ? 'on' : 'off'], ['Server', `max_ray ${version}`], ['This replica runs', seconds(uptime)],
  ];
  parts.facts.replaceChildren(...facts.map(([name, value]) => el('div', {}, el('dt', {}, name), el('dd', {}, value))));
}
