// The panel of parameters: what is left empty is not sent, so the model's own defaults hold.

import { byId, el, iconButton } from './dom.js';
import { setting } from './store.js';

const NUMBERS = [
  ['temperature', 'Temperature', 'How freely tokens are drawn; 0 takes the most likely one', 0, 2, 0.1],
  ['top_p', 'Top p', 'Draw from the most likely tokens up to this share', 0, 1, 0.05],
  ['top_k', 'Top k', 'Draw from this many tokens', 1, null, 1],
  ['min_p', 'Min p', 'Leave out tokens below this share of the best one', 0, 1, 0.01],
  ['max_tokens', 'Max tokens', 'Longest answer', 1, null, 1],
  ['seed', 'Seed', 'The same seed gives the same answer', 0, null, 1],
  ['repetition_penalty', 'Repetition penalty', '1 is none', 0.1, 2, 0.05],
  ['presence_penalty', 'Presence penalty', '0 is none', -2, 2, 0.1],
  ['frequency_penalty', 'Frequency penalty', '0 is none', -2, 2, 0.1],
];
const TOOLS_EXAMPLE = '[{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}]';

let values = setting.get('parameters', {});

function set(name, value) {
  if (value === '' || value === false || value === null) delete values[name];
  else values[name] = value;
  setting.set('parameters', values);
  for (const field of document.querySelectorAll(`[data-parameter="${name}"]`)) field.classList.toggle('set', name in values);
}

// The fields of a request. Throws an Error whose message is a sentence where a field cannot be read.
export function requestFields(model) {
  const fields = {};
  for (const [name, label] of NUMBERS) {
    if (!(name in values)) continue;
    if (!Number.isFinite(Number(values[name]))) throw new Error(`${label} is not a number.`);
    fields[name] = Number(values[name]);
  }
  if (values.stop) fields.stop = values.stop.split('\n').filter(Boolean);
  if (values.reasoning_effort && model.reasoning_parser !== 'none') fields.reasoning_effort = values.reasoning_effort;
  if (values.logprobs) Object.assign(fields, { logprobs: true, top_logprobs: 5 });
  if (values.tools) fields.tools = read(values.tools, 'The tools', Array.isArray);
  if (values.tools && values.tool_choice) fields.tool_choice = values.tool_choice;
  if (values.schema) fields.response_format = { type: 'json_schema', json_schema: { name: 'answer', schema: read(values.schema, 'The JSON schema', (value) => typeof value === 'object') } };
  return fields;
}

function read(text, what, isRight) {
  let value;
  try {
    value = JSON.parse(text);
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
    throw new Error(`${what} in the parameters are not JSON: ${error.message}`);
  }
  if (!isRight(value)) throw new Error(`${what} in the parameters have another shape than the example.`);
  return value;
}

export const showsLogprobs = () => Boolean(values.logprobs);

// `chat`: whose system prompt is edited; `save` is called when it changes.
export function renderParameters(chat, model, save) {
  const system = el('textarea', { id: 'system', rows: 4, value: chat.system, placeholder: 'How the assistant behaves, in this chat' });
  system.addEventListener('input', () => {
    chat.system = system.value;
    save();
  });
  byId('parameters').replaceChildren(
    el('header', {}, el('h2', {}, 'Parameters'), iconButton('close', 'Close the parameters', () => byId('open-parameters').click())),
    field('System prompt', null, system),
    el('div', { className: 'numbers' }, NUMBERS.map(numberField)),
    field('Stop strings', 'One a line', area('stop', 2, '')),
    model?.reasoning_parser && model.reasoning_parser !== 'none' ? field('Reasoning effort', null, select('reasoning_effort', ['none', 'low', 'medium', 'high'])) : '',
    el('label', { className: 'check' }, logprobsSwitch(), 'Token probabilities: point at a token to see the others'),
    field('Tools', 'A JSON list of functions, as in the OpenAI API', area('tools', 4, TOOLS_EXAMPLE)),
    field('Tool choice', null, select('tool_choice', ['auto', 'required', 'none'])),
    field('JSON schema of the answer', null, area('schema', 3, '{"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}')),
    el('button', { type: 'button', className: 'quiet wide', onclick: () => reset(chat, model, save) }, 'Reset the parameters'),
    el('p', { className: 'muted' }, 'Empty fields are not sent: the model’s own defaults hold. What a model or this server does not take, it says.'),
  );
}

function reset(chat, model, save) {
  values = {};
  setting.set('parameters', values);
  renderParameters(chat, model, save);
}

const field = (label, hint, control) => el('label', { className: 'field' }, el('span', {}, label, hint ? el('small', {}, hint) : null), control);

function numberField([name, label, hint, min, max, step]) {
  const input = el('input', { type: 'number', min, max, step: name === 'seed' || step === 1 ? 1 : 'any', value: values[name] ?? '', placeholder: 'default', title: hint, inputMode: 'decimal' });
  return field(label, null, bound(input, name));
}

const area = (name, rows, placeholder) => bound(el('textarea', { rows, placeholder, spellcheck: false, value: values[name] ?? '' }), name);

const select = (name, options) => {
  const node = el('select', {}, el('option', { value: '' }, 'default'), options.map((value) => el('option', { value }, value)));
  node.value = values[name] ?? '';
  return bound(node, name);
};

function bound(node, name) {
  node.dataset.parameter = name;
  node.classList.toggle('set', name in values);
  node.addEventListener('input', () => set(name, node.value));
  return node;
}

function logprobsSwitch() {
  const node = el('input', { type: 'checkbox', id: 'logprobs', checked: Boolean(values.logprobs) });
  node.addEventListener('change', () => set('logprobs', node.checked));
  return node;
}
