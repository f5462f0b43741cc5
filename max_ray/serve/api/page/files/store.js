// Chats and settings in this browser's localStorage: an entry a chat, so that two tabs do not overwrite each other.

const CHAT = 'max_ray.chat.';

export function newChat() {
  return { id: crypto.randomUUID?.() ?? String(Date.now() + Math.random()), title: '', changed: Date.now(), model: '', system: '', messages: [] };
}

// Chats without their messages' weight matter little here: they are parsed once, at the start and when a list is shown.
export function loadChats() {
  return Object.keys(localStorage)
    .filter((key) => key.startsWith(CHAT))
    .map((key) => parsed(localStorage.getItem(key)))
    .filter((chat) => Array.isArray(chat?.messages))
    .sort((a, b) => b.changed - a.changed);
}

// Whether the chat is kept: the browser gives a site some MiB, and images are large. Token probabilities are not kept.
export function saveChat(chat) {
  try {
    localStorage.setItem(CHAT + chat.id, JSON.stringify(chat, (key, value) => (key === 'logprobs' ? undefined : value)));
    return true;
  } catch (error) {
    if (error.name !== 'QuotaExceededError') throw error;
    return false;
  }
}

export const removeChat = (id) => localStorage.removeItem(CHAT + id);
export const isChatKey = (key) => key === null || key.startsWith(CHAT);

export const setting = {
  get: (name, otherwise) => parsed(localStorage.getItem(`max_ray.${name}`)) ?? otherwise,
  set: (name, value) => localStorage.setItem(`max_ray.${name}`, JSON.stringify(value)),
};

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
    return null;
  }
}
