// The page's frame: views, theme, panels, the dialog for the API key.

import { apiKey, onMissingKey } from './api.js';
import { loadModels, startChat } from './chat.js';
import { byId, icon } from './dom.js';
import { hideServer, showServer } from './server.js';
import { setting } from './store.js';

const isWide = matchMedia('(min-width: 1200px)');

function showView() {
  const view = location.hash === '#server' ? 'server' : 'chat';
  document.body.dataset.view = view;
  document.body.classList.remove('with-sidebar');
  for (const link of document.querySelectorAll('.tabs a')) {
    if (link.dataset.view === view) link.setAttribute('aria-current', 'page');
    else link.removeAttribute('aria-current');
  }
  if (view === 'server') showServer();
  else hideServer();
}

function startTheme() {
  const select = byId('theme');
  const apply = () => {
    document.documentElement.dataset.theme = select.value;
    dispatchEvent(new Event('theme'));
  };
  select.value = setting.get('theme', '');
  select.addEventListener('change', () => {
    setting.set('theme', select.value);
    apply();
  });
  apply();
}

function startPanels() {
  const sidebar = byId('open-sidebar');
  const toggleSidebar = (isOpen) => {
    document.body.classList.toggle('with-sidebar', isOpen);
    sidebar.setAttribute('aria-expanded', String(document.body.classList.contains('with-sidebar')));
  };
  sidebar.addEventListener('click', () => toggleSidebar());
  byId('shade').addEventListener('click', () => {
    toggleSidebar(false);
    if (!isWide.matches) showParameters(false);
  });
  byId('open-parameters').addEventListener('click', () => showParameters(byId('parameters').hidden));
  document.addEventListener('keydown', (event) => {
    if (event.key !== 'Escape' || document.querySelector('dialog[open]')) return;
    toggleSidebar(false);
    if (!isWide.matches) showParameters(false);
  });
  showParameters(isWide.matches && setting.get('panel', false));
}

function showParameters(isShown) {
  byId('parameters').hidden = !isShown;
  document.body.classList.toggle('with-parameters', isShown);
  byId('open-parameters').setAttribute('aria-expanded', String(isShown));
  if (isWide.matches) setting.set('panel', isShown);
}

function startKey() {
  const dialog = byId('key-dialog');
  const ask = (sentence) => new Promise((resolve) => {
    byId('key-text').textContent = sentence;
    byId('key').value = '';
    byId('forget-key').hidden = !apiKey.get();
    dialog.returnValue = '';
    dialog.showModal();
    dialog.addEventListener('close', () => {
      const key = byId('key').value.trim();
      if (dialog.returnValue === 'forget') apiKey.set('');
      const isGiven = dialog.returnValue === 'save' && Boolean(key);
      if (isGiven) apiKey.set(key, byId('keep-key').checked);
      resolve(isGiven);
    }, { once: true });
  });
  byId('forget-key').addEventListener('click', () => dialog.close('forget'));
  byId('cancel-key').addEventListener('click', () => dialog.close('cancel'));
  onMissingKey((wasRefused) => ask(wasRefused ? 'The server did not accept this key.' : 'This server asks for a key. It is sent to this server only.'));
  byId('change-key').addEventListener('click', async () => {
    if (await ask(apiKey.get() ? 'A key is set. Enter another one, or forget it.' : 'No key is set. The server may not need one.')) await loadModels();
  });
}

for (const place of document.querySelectorAll('[data-icon]')) place.replaceWith(icon(place.dataset.icon));
startTheme();
startPanels();
startKey();
addEventListener('hashchange', showView);
showView();
await startChat();
