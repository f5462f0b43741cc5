// The server's HTTP API: the key, errors as sentences, and streams of events.

const BASE = new URL('../', import.meta.url); // the page's folder, whatever prefix it is served below
const KEY = 'max_ray.key';
const LONGEST_ERROR = 2000;

export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY) ?? '',
  set(key, isKept) {
    sessionStorage.removeItem(KEY);
    localStorage.removeItem(KEY);
    if (key) (isKept ? localStorage : sessionStorage).setItem(KEY, key);
  },
};

// Set by the page: asks for a key and resolves to whether one was given. Requests that fail together ask once.
let askForKey = async () => false;
let asking = null;
export function onMissingKey(ask) {
  askForKey = ask;
}

async function request(path, { method = 'GET', body, signal } = {}) {
  for (;;) {
    const key = apiKey.get();
    const headers = { ...(body ? { 'Content-Type': 'application/json' } : {}), ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    const response = await fetch(new URL(path, BASE), { method, headers, body: body && JSON.stringify(body), signal, cache: 'no-store' }).catch((error) => {
      if (error.name === 'AbortError') throw error;
      throw new ServerError('The server does not answer. It may have been stopped, or the connection was lost.');
    });
    if (response.ok) return response;
    const error = await errorOf(response);
    if (response.status !== 401 || (apiKey.get() === key && !(await askOnce(Boolean(key))))) throw error;
  }
}

function askOnce(wasRefused) {
  asking ??= askForKey(wasRefused).finally(() => { asking = null; });
  return asking;
}

async function errorOf(response) {
  const text = await response.text();
  let sentence = `The server answered with status ${response.status}.`;
  try {
    sentence = sentenceOf(JSON.parse(text)) ?? sentence;
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error; // an answer that is no JSON: from a proxy
  }
  const wait = response.headers.get('Retry-After');
  return new ServerError(wait ? `${sentence} Try again in ${wait} s.` : sentence, response.status);
}

function sentenceOf(body) {
  const message = body?.error?.message ?? body?.error;
  return typeof message === 'string' && message ? message.slice(0, LONGEST_ERROR) : null;
}

export const getJson = async (path, signal) => (await request(path, { signal })).json();

// The chunks of a streamed answer. An error event is thrown; a stream that breaks off is one, too.
export async function* stream(path, body, signal) {
  const response = await request(path, { method: 'POST', body, signal });
  let isDone = false;
  for await (const data of events(response.body)) {
    if (data === '[DONE]') {
      isDone = true;
      continue;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(sentenceOf(chunk) ?? 'The server failed to answer.');
    yield chunk;
  }
  if (!isDone) throw new ServerError('The answer broke off: the connection to the server was lost.');
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === 'AbortError') throw error;
      throw new ServerError('The answer broke off: the connection to the server was lost.');
    });
    if (done) return;
    const parts = (rest + value).split('\n\n');
    rest = parts.pop();
    for (const part of parts) {
      const lines = part.split('\n').filter((line) => line.startsWith('data:'));
      if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join('\n');
    }
  }
}
