// One message as elements: text, reasoning, tool calls, token probabilities, images, speed and errors.

import { byId, copy, count, el, icon, iconButton, seconds } from './dom.js';
import { markdown } from './markdown.js';

const ROLES = { user: 'You', assistant: 'Assistant', tool: 'Tool result', system: 'System' };
const ENDS = { length: 'cut by the length limit', stopped: 'stopped', timeout: 'ended by the time limit' };

// `actions`: edit(index), regenerate(index), answerTool(call, text); null for a part of the page that cannot act now.
export function messageView(message, index, actions) {
  const node = el('article', { className: `message ${message.role}`, 'aria-label': ROLES[message.role], data: { index } });
  fill(node, message, index, actions);
  return node;
}

export function fill(node, message, index, actions, isStreaming = false) {
  const isReasoningOpen = node.querySelector('details.reasoning')?.open;
  node.classList.toggle('streaming', isStreaming);
  node.replaceChildren(
    ...[
      images(message),
      reasoning(message, isReasoningOpen ?? false, isStreaming),
      body(message, isStreaming),
      ...(message.tool_calls ?? []).map((call) => toolCard(call, isStreaming ? null : actions)),
      message.error ? errorBox(message.error, () => actions.regenerate(index)) : null,
      isStreaming ? null : foot(message, index, actions),
    ].filter(Boolean),
  );
}

function images(message) {
  if (!message.images?.length) return null;
  return el('div', { className: 'pictures' }, message.images.map((src) => el('img', { src, alt: 'Image of this message' })));
}

function reasoning(message, isOpen, isStreaming) {
  if (!message.reasoning) return null;
  const isThinking = isStreaming && !message.content && !message.tool_calls?.length;
  const title = isThinking ? 'Thinking …' : 'Thoughts';
  return el('details', { className: 'reasoning', open: isOpen }, el('summary', {}, title), el('div', { className: 'text' }, markdown(message.reasoning)));
}

function body(message, isStreaming) {
  if (message.role === 'tool') {
    return el('details', { className: 'tool-result' }, el('summary', {}, icon('tool'), `Result of ${message.name ?? 'the tool'}`), el('pre', {}, message.content));
  }
  if (message.showsTokens && message.logprobs?.length) return tokenView(message.logprobs);
  if (!message.content) return isStreaming && !message.reasoning && !message.tool_calls ? el('div', { className: 'waiting', 'aria-label': 'Waiting for the first token' }, el('i'), el('i'), el('i')) : null;
  if (message.role === 'user') return el('div', { className: 'text plain' }, message.content);
  return el('div', { className: 'text' }, markdown(message.content));
}

function toolCard(call, actions) {
  const card = el(
    'section', { className: 'card', 'aria-label': `Call of the tool ${call.name}` },
    el('header', {}, icon('tool'), el('strong', {}, call.name), el('span', { className: 'muted' }, call.isAnswered ? 'answered' : 'tool call')),
    el('pre', { tabIndex: 0 }, pretty(call.arguments)),
  );
  if (call.isAnswered || !call.id || !actions?.answerTool) return card;
  const input = el('textarea', { rows: 2, placeholder: 'The result that the tool gives', 'aria-label': `Result of ${call.name}` });
  const send = () => actions.answerTool(call, input.value);
  card.append(el('div', { className: 'row' }, input, el('button', { type: 'button', className: 'solid', onclick: send }, 'Send result')));
  return card;
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
    return text; // still arriving, or cut by a limit
  }
}

export function errorBox(sentence, retry) {
  return el('div', { className: 'notice error', role: 'alert' }, el('span', {}, sentence), retry ? el('button', { type: 'button', className: 'quiet', onclick: retry }, 'Try again') : null);
}

function foot(message, index, actions) {
  const buttons = [];
  if (message.content) buttons.push(iconButton('copy', 'Copy', (event) => copy(message.content, event.currentTarget)));
  if (message.role === 'user') buttons.push(iconButton('edit', 'Edit and send again', () => actions.edit(index)));
  if (message.role === 'assistant') buttons.push(iconButton('again', 'Answer again', () => actions.regenerate(index)));
  if (message.logprobs?.length) {
    const toggle = iconButton('tokens', 'Token probabilities', () => {
      message.showsTokens = !message.showsTokens;
      fill(document.querySelector(`.message[data-index="${index}"]`), message, index, actions);
    });
    toggle.setAttribute('aria-pressed', String(Boolean(message.showsTokens)));
    buttons.push(toggle);
  }
  return el('footer', {}, el('span', { className: 'buttons' }, buttons), el('span', { className: 'speed' }, speed(message)));
}

// "42 tokens · 31.2 tokens/s · first token 85 ms"; the rate is of the tokens behind the first.
function speed({ stats, finish }) {
  if (!stats) return finish in ENDS ? ENDS[finish] : '';
  const rate = stats.tokens > 1 && stats.rest_s > 0 ? `${perSecond((stats.tokens - 1) / stats.rest_s)} tokens/s` : null;
  const cached = stats.cached ? ` (${count(stats.cached)} cached)` : '';
  const prompt = stats.prompt ? `prompt ${count(stats.prompt)}${cached}` : null;
  return [`${count(stats.tokens)} tokens`, rate, `first token ${seconds(stats.first_s)}`, prompt, ENDS[finish]].filter(Boolean).join(' · ');
}

const perSecond = (value) => (value < 100 ? value.toFixed(1) : count(value));

// Token probabilities: a tint a token; pointer, focus and arrow keys show the alternatives.

function tokenView(tokens) {
  const pieces = texts(tokens);
  const spans = tokens.map((token, i) => el('span', { className: `token p${band(token.logprob)}`, data: { number: i } }, pieces[i] || '·'));
  const show = (i) => showAlternatives(spans, tokens, pieces, i);
  const view = el('div', { className: 'text plain tokens', tabIndex: 0, role: 'group', 'aria-label': 'Tokens with probabilities. Arrow keys go from token to token.' }, spans);
  view.addEventListener('pointerover', (event) => event.target.dataset.number && show(Number(event.target.dataset.number)));
  view.addEventListener('pointerleave', hideAlternatives);
  view.addEventListener('blur', hideAlternatives);
  view.addEventListener('keydown', (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === 'Escape') hideAlternatives();
    if (!step) return;
    event.preventDefault();
    const now = spans.findIndex((span) => span.classList.contains('current'));
    show(Math.max(0, Math.min(spans.length - 1, now + step)));
  });
  return view;
}

// Characters whose bytes several tokens share stand at the last of them.
function texts(tokens) {
  const decoder = new TextDecoder();
  return tokens.map((token) => (token.bytes ? decoder.decode(new Uint8Array(token.bytes), { stream: true }) : token.token));
}

const band = (logprob) => Math.min(4, Math.floor(-logprob / 0.7)); // 0: above 50 %, 4: below 6 %

function showAlternatives(spans, tokens, pieces, number) {
  const token = tokens[number];
  const rows = token.top_logprobs.map((other) => ({ text: other.token, logprob: other.logprob, isChosen: other.token === token.token }));
  if (!rows.some((row) => row.isChosen)) rows.push({ text: pieces[number] || token.token, logprob: token.logprob, isChosen: true });
  const box = byId('probabilities');
  box.replaceChildren(...rows.map((row) => {
    const bar = el('i');
    bar.style.width = `${Math.exp(row.logprob) * 100}%`;
    return el('div', { className: row.isChosen ? 'chosen' : '' }, el('code', {}, JSON.stringify(row.text).slice(1, -1)), el('span', { className: 'meter' }, bar), el('b', {}, percent(Math.exp(row.logprob))));
  }));
  box.hidden = false;
  spans.forEach((span, i) => span.classList.toggle('current', i === number));
  const place = spans[number].getBoundingClientRect();
  const above = place.top - box.offsetHeight - 6;
  box.style.left = `${Math.max(8, Math.min(place.left, innerWidth - box.offsetWidth - 8))}px`;
  box.style.top = `${above > 8 ? above : place.bottom + 6}px`;
}

export function hideAlternatives() {
  byId('probabilities').hidden = true;
  document.querySelector('.token.current')?.classList.remove('current');
}

const percent = (share) => (share >= 0.0995 ? `${(share * 100).toFixed(0)} %` : share >= 0.001 ? `${(share * 100).toFixed(1)} %` : '< 0.1 %');
