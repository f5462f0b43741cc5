// The chat: the list of chats, the messages of one, and the answer that streams into it.

import { ServerError, getJson, stream } from './api.js';
import { byId, el, iconButton } from './dom.js';
import { errorBox, fill, hideAlternatives, messageView } from './message.js';
import { renderParameters, requestFields, showsLogprobs } from './parameters.js';
import { isChatKey, loadChats, newChat, removeChat, saveChat, setting } from './store.js';

const MAX_IMAGE_BYTES = 16 * 1024 * 1024;
const EXAMPLES = ['Explain what a KV cache is, in three sentences.', 'Write a haiku about a server.', 'List three uses of a paper clip.'];

let chats = [];
let chat = newChat();
let models = [];
let model = null; // what /v1/models/{id} says of the chosen one
let running = null; // the AbortController of the answer in progress
let attached = [];

export async function startChat() {
  chats = loadChats();
  byId('new-chat').addEventListener('click', () => open(newChat()));
  byId('composer').addEventListener('submit', (event) => {
    event.preventDefault();
    send();
  });
  byId('stop').addEventListener('click', () => running?.abort());
  byId('model').addEventListener('change', () => choose(byId('model').value));
  document.addEventListener('keydown', onKey);
  window.addEventListener('storage', (event) => isChatKey(event.key) && !running && refresh());
  startInput();
  startImages();
  open(newChat());
  await loadModels();
}

function refresh() {
  chats = loadChats();
  listChats();
}

// Models.

export async function loadModels() {
  try {
    models = (await getJson('v1/models')).data;
    byId('model').replaceChildren(...models.map(({ id }) => el('option', { value: id }, id)));
    const wanted = setting.get('model', '');
    await choose(models.some(({ id }) => id === wanted) ? wanted : models[0]?.id);
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    byId('messages').replaceChildren(errorBox(error.message, loadModels));
  }
}

async function choose(id) {
  if (!id) return;
  model = models.find((one) => one.id === id);
  byId('model').value = id;
  byId('model').title = id;
  setting.set('model', id);
  model = { ...model, ...(await getJson(`v1/models/${id.split('/').map(encodeURIComponent).join('/')}`)) };
  byId('attach').hidden = !model.modalities?.includes('image');
  byId('input').disabled = byId('send').disabled = isEmbedding();
  renderParameters(chat, model, save);
  render();
}

const isEmbedding = () => model?.task === 'embeddings_generation';

// Chats.

function open(next) {
  running?.abort();
  chat = next;
  document.body.classList.remove('with-sidebar');
  renderParameters(chat, model, save);
  listChats();
  render();
  byId('input').focus();
}

function listChats() {
  byId('chats').replaceChildren(...chats.map((one) => el(
    'li', { className: one.id === chat.id ? 'current' : '' },
    el('button', { className: 'title', title: one.title, 'aria-current': one.id === chat.id ? 'true' : null, onclick: () => { location.hash = '#chat'; open(one); } }, one.title || 'New chat'),
    iconButton('trash', `Delete the chat ${one.title}`, () => forget(one)),
  )));
}

function forget(one) {
  removeChat(one.id);
  chats = chats.filter(({ id }) => id !== one.id);
  if (one.id === chat.id) open(newChat());
  else listChats();
}

function save() {
  if (!chat.messages.length) return;
  chat.changed = Date.now();
  chat.title ||= titleOf(chat.messages[0]);
  if (!chats.includes(chat)) chats.unshift(chat);
  if (!saveChat(chat)) say('This browser’s storage is full: this chat is lost when the tab closes. Delete chats that you do not need.');
}

const titleOf = (message) => (message.content || 'Image').split('\n')[0].slice(0, 60);

function say(sentence) {
  byId('status').textContent = sentence;
  byId('hint').textContent = sentence;
}

// What is shown.

function render() {
  hideAlternatives();
  const shown = chat.messages.length ? chat.messages.map((message, index) => messageView(message, index, actions)) : [welcome()];
  byId('messages').replaceChildren(...shown);
  scrollDown(true);
}

function welcome() {
  if (isEmbedding()) return el('div', { className: 'welcome' }, el('h2', {}, model.id), el('p', {}, 'This model makes vectors of texts, so there is no chat with it. Its route is /v1/embeddings.'));
  const examples = EXAMPLES.map((text) => el('button', { type: 'button', className: 'example', onclick: () => send(text) }, text));
  const length = model?.max_model_len ? `Up to ${model.max_model_len.toLocaleString('en')} tokens a chat. ` : '';
  return el('div', { className: 'welcome' }, el('h2', {}, model ? `Chat with ${model.id}` : 'Chat'), el('p', { className: 'muted' }, `${length}Chats are kept in this browser only.`), el('div', { className: 'examples' }, examples));
}

function scrollDown(isForced) {
  const box = byId('messages');
  if (isForced || box.scrollHeight - box.scrollTop - box.clientHeight < 120) box.scrollTop = box.scrollHeight;
}

// Sending.

const actions = {
  edit(index) {
    if (running) return;
    const message = chat.messages[index];
    const input = el('textarea', { value: message.content, rows: Math.min(12, message.content.split('\n').length + 1), 'aria-label': 'Edited message' });
    const done = () => sendEdited(index, input.value);
    input.addEventListener('keydown', (event) => {
      if (event.key === 'Escape') render();
      if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        done();
      }
    });
    const buttons = el('div', { className: 'row' }, el('span', { className: 'space' }), el('button', { type: 'button', className: 'quiet', onclick: render }, 'Cancel'), el('button', { type: 'button', className: 'solid', onclick: done }, 'Send'));
    document.querySelector(`.message[data-index="${index}"]`).replaceChildren(el('div', { className: 'editor' }, input, buttons));
    input.focus();
  },
  regenerate(index) {
    if (running) return;
    chat.messages.length = chat.messages[index].role === 'assistant' ? index : index + 1;
    answer();
  },
  answerTool(call, content) {
    if (running) return;
    call.isAnswered = true;
    chat.messages.push({ role: 'tool', tool_call_id: call.id, name: call.name, content });
    const asking = chat.messages.findLast((message) => message.tool_calls);
    if (asking.tool_calls.every((one) => one.isAnswered)) answer();
    else render();
    save();
  },
};

function sendEdited(index, content) {
  if (!content.trim()) return;
  const { images } = chat.messages[index];
  chat.messages.length = index;
  chat.messages.push({ role: 'user', content, ...(images ? { images } : {}) });
  answer();
}

function send(text) {
  const content = text ?? byId('input').value;
  if (running || isEmbedding() || (!content.trim() && !attached.length)) return;
  chat.messages.push({ role: 'user', content, ...(attached.length ? { images: attached } : {}) });
  attached = [];
  showAttached();
  if (text === undefined) byId('input').value = '';
  grow();
  answer();
}

async function answer() {
  const own = chat;
  const message = { role: 'assistant', content: '' };
  const body = { model: model?.id, messages: toSend(own), stream: true, stream_options: { include_usage: true } };
  own.messages.push(message);
  save();
  listChats();
  render();
  running = new AbortController();
  showRunning(true);
  const paint = painter(own, message);
  try {
    Object.assign(body, requestFields(model ?? {}));
    message.showsTokens = showsLogprobs();
    await receive(body, message, running.signal, paint);
  } catch (error) {
    if (error.name === 'AbortError') message.finish = 'stopped';
    else message.error = error.message;
  }
  running = null;
  showRunning(false);
  if (chats.includes(own)) saveOwn(own);
  if (own === chat) paint.last();
  byId('status').textContent = message.error ? '' : 'The answer is complete.';
}

// An answer can end after another chat was opened: it is kept in its own.
function saveOwn(own) {
  const shown = chat;
  chat = own;
  save();
  chat = shown;
}

function toSend({ system, messages }) {
  const sent = messages.filter((message) => message.content || message.tool_calls || message.images || message.role === 'tool').map((message) => {
    if (message.role === 'tool') return { role: 'tool', tool_call_id: message.tool_call_id, content: message.content };
    if (message.images) return { role: 'user', content: [...message.images.map((url) => ({ type: 'image_url', image_url: { url } })), ...(message.content ? [{ type: 'text', text: message.content }] : [])] };
    const calls = message.tool_calls?.map((call) => ({ id: call.id, type: 'function', function: { name: call.name, arguments: call.arguments } }));
    return { role: message.role, content: message.content, ...(calls ? { tool_calls: calls } : {}) };
  });
  return system.trim() ? [{ role: 'system', content: system }, ...sent] : sent;
}

// Takes the chunks of an answer into its message.
async function receive(body, message, signal, paint) {
  const begin = performance.now();
  let first = null;
  const note = () => {
    const now = performance.now();
    first ??= now;
    return { first_s: (first - begin) / 1000, rest_s: (now - first) / 1000 };
  };
  let times = null;
  let pieces = 0;
  try {
    for await (const chunk of stream('v1/chat/completions', body, signal)) {
      if (chunk.usage) message.stats = { ...(times ?? note()), tokens: chunk.usage.completion_tokens, prompt: chunk.usage.prompt_tokens, cached: chunk.usage.prompt_tokens_details?.cached_tokens };
      const choice = chunk.choices?.[0];
      if (!choice) continue;
      if (take(choice, message)) {
        times = note();
        pieces += 1;
      }
      paint();
    }
  } finally {
    if (!message.stats && times) message.stats = { ...times, tokens: message.logprobs?.length ?? pieces };
  }
}

// Whether the chunk had something of the answer.
function take({ delta = {}, logprobs, finish_reason: finish }, message) {
  if (delta.content) message.content += delta.content;
  if (delta.reasoning_content) message.reasoning = (message.reasoning ?? '') + delta.reasoning_content;
  for (const call of delta.tool_calls ?? []) takeCall(call, message);
  if (logprobs?.content?.length) (message.logprobs ??= []).push(...logprobs.content);
  if (finish) message.finish = finish;
  return Boolean(delta.content || delta.reasoning_content || delta.tool_calls || logprobs?.content?.length);
}

function takeCall({ index, id, function: { name, arguments: more } = {} }, message) {
  message.tool_calls ??= [];
  const call = (message.tool_calls[index] ??= { id: '', name: '', arguments: '' });
  call.id ||= id ?? '';
  call.name ||= name ?? '';
  call.arguments += more ?? '';
}

// Paints a streaming message at most once a frame, and less often the longer a painting takes.
function painter(own, message) {
  const index = own.messages.indexOf(message);
  const node = () => (own === chat ? document.querySelector(`.message[data-index="${index}"]`) : null);
  let isDue = false;
  let pause = 0;
  const now = (isStreaming) => {
    const begin = performance.now();
    if (node()) fill(node(), message, index, actions, isStreaming);
    scrollDown(false);
    pause = Math.min(500, 5 * (performance.now() - begin));
  };
  const paint = () => {
    if (isDue) return;
    isDue = true;
    setTimeout(() => requestAnimationFrame(() => {
      isDue = false;
      if (running && own.messages.includes(message) && !message.error) now(true);
    }), pause);
  };
  paint.last = () => now(false);
  now(true);
  return paint;
}

function showRunning(isRunning) {
  byId('send').hidden = isRunning;
  byId('stop').hidden = !isRunning;
  byId('messages').setAttribute('aria-busy', String(isRunning));
}

// The message box.

function startInput() {
  const input = byId('input');
  input.addEventListener('input', grow);
  input.addEventListener('keydown', (event) => {
    if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
}

function grow() {
  const input = byId('input');
  input.style.height = 'auto';
  input.style.height = `${Math.min(input.scrollHeight, innerHeight * 0.4)}px`;
}

function onKey(event) {
  if (event.key === 'Escape' && running && !document.querySelector('dialog[open]')) running.abort();
  if (event.key.toLowerCase() === 'o' && event.shiftKey && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    open(newChat());
  }
}

// Images.

function startImages() {
  const view = byId('chat-view');
  byId('attach').addEventListener('click', () => byId('files').click());
  byId('files').addEventListener('change', () => {
    attach(byId('files').files);
    byId('files').value = '';
  });
  view.addEventListener('dragover', (event) => {
    event.preventDefault();
    view.classList.add('dropping');
  });
  view.addEventListener('dragleave', () => view.classList.remove('dropping'));
  view.addEventListener('drop', (event) => {
    event.preventDefault();
    view.classList.remove('dropping');
    attach(event.dataTransfer.files);
  });
  byId('input').addEventListener('paste', (event) => event.clipboardData.files.length && attach(event.clipboardData.files));
}

async function attach(files) {
  if (!model?.modalities?.includes('image')) return say(`${model?.id ?? 'This model'} does not see images.`);
  for (const file of files) {
    if (!file.type.startsWith('image/')) say(`${file.name} is no image.`);
    else if (file.size > MAX_IMAGE_BYTES) say(`${file.name} is larger than 16 MiB.`);
    else attached.push(await dataUrl(file));
  }
  return showAttached();
}

const dataUrl = (file) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(reader.error);
  reader.readAsDataURL(file);
});

function showAttached() {
  byId('attached').replaceChildren(...attached.map((src, i) => el('span', {}, el('img', { src, alt: `Image ${i + 1}` }), iconButton('close', `Remove image ${i + 1}`, () => {
    attached.splice(i, 1);
    showAttached();
  }))));
}
