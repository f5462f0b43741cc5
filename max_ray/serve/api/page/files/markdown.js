// Markdown to elements. Built from text nodes only; raw HTML stays text, images become links, links are http(s) or mail.

import { copy, el, iconButton } from './dom.js';

const MAX_DEPTH = 8;
const WINDOW = 3000; // how far the end of a span is looked for, so that long texts of openers stay fast
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*)$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?: +|$)(.*)$/;
const QUOTE = /^ {0,3}> ?/;
const DIVIDER = /^ *\|? *:?-+:? *(?:\| *:?-+:? *)*\|? *$/;
const SPECIAL = /\\[!-/:-@[-`{-~]|`+|\*{1,3}|_{1,3}|~~|!?\[|https?:\/\/[^\s<>"'`)\]]+|\n/g;

export function markdown(text) {
  const root = document.createDocumentFragment();
  blocks(text.replaceAll('\r\n', '\n').replaceAll('\t', '    ').split('\n'), root, 0);
  return root;
}

function blocks(lines, parent, depth) {
  let at = 0;
  while (at < lines.length) at = block(lines, at, parent, depth);
}

// Adds the block that begins at line `at`; gives the line behind it.
function block(lines, at, parent, depth) {
  const line = lines[at];
  let match;
  if (!line.trim()) return at + 1;
  if ((match = FENCE.exec(line))) return fence(lines, at, match, parent);
  if ((match = HEADING.exec(line))) {
    parent.append(inlined(`h${Math.min(6, match[1].length + 2)}`, match[2].replace(/ #+ *$/, '')));
    return at + 1;
  }
  if (RULE.test(line)) {
    parent.append(el('hr'));
    return at + 1;
  }
  if (QUOTE.test(line) && depth < MAX_DEPTH) return quote(lines, at, parent, depth);
  if (ITEM.test(line) && depth < MAX_DEPTH) return list(lines, at, parent, depth);
  if (line.includes('|') && at + 1 < lines.length && lines[at + 1].includes('-') && lines[at + 1].length < WINDOW && DIVIDER.test(lines[at + 1])) return table(lines, at, parent);
  return paragraph(lines, at, parent, depth);
}

function fence(lines, at, [, mark, language], parent) {
  let end = at + 1;
  while (end < lines.length && !(lines[end].trimStart().startsWith(mark) && lines[end].trim().length >= mark.length && !lines[end].trim().replaceAll(mark[0], ''))) end += 1;
  const code = lines.slice(at + 1, end).join('\n');
  const head = el('div', { className: 'code-head' }, el('span', {}, language || 'text'), iconButton('copy', 'Copy code', (event) => copy(code, event.currentTarget)));
  parent.append(el('figure', { className: 'code' }, head, el('pre', { tabIndex: 0 }, el('code', {}, code))));
  return end + 1;
}

function quote(lines, at, parent, depth) {
  const inside = [];
  for (; at < lines.length && QUOTE.test(lines[at]); at += 1) inside.push(lines[at].replace(QUOTE, ''));
  const node = el('blockquote');
  blocks(inside, node, depth + 1);
  parent.append(node);
  return at;
}

function list(lines, at, parent, depth) {
  const [, indent, marker] = ITEM.exec(lines[at]);
  const isOrdered = /\d/.test(marker);
  const node = isOrdered ? el('ol', { start: parseInt(marker, 10) }) : el('ul');
  while (at < lines.length) {
    const match = ITEM.exec(lines[at]);
    if (!match || match[1].length < indent.length || /\d/.test(match[2]) !== isOrdered || RULE.test(lines[at])) break;
    const inside = [match[3]];
    const offset = match[1].length + match[2].length + 1;
    for (at += 1; at < lines.length && belongs(lines, at, indent.length); at += 1) inside.push(lines[at].slice(Math.min(offset, lines[at].search(/\S|$/))));
    const item = el('li');
    blocks(inside, item, depth + 1);
    if (item.childNodes.length === 1 && item.firstChild.tagName === 'P') item.replaceChildren(...item.firstChild.childNodes);
    node.append(item);
  }
  parent.append(node);
  return at;
}

// Whether a line goes on with a list item: it is indented, or empty before a line that is, or plain text.
function belongs(lines, at, indent) {
  if (!lines[at].trim()) {
    const next = lines[at + 1] ?? '';
    return Boolean(next.trim()) && (next.search(/\S/) > indent || ITEM.test(next));
  }
  const match = ITEM.exec(lines[at]);
  if (match) return match[1].length > indent;
  return lines[at].search(/\S/) > indent || (Boolean(lines[at - 1].trim()) && !starts(lines[at]));
}

const starts = (line) => FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line);

function table(lines, at, parent) {
  const alignments = cells(lines[at + 1]).map((cell) => (/:$/.test(cell) ? (/^:/.test(cell) ? 'center' : 'right') : 'left'));
  const row = (kind, line) => el('tr', {}, cells(line).slice(0, alignments.length).map((cell, i) => {
    const node = inlined(kind, cell);
    node.className = alignments[i];
    return node;
  }));
  const body = el('tbody');
  const head = el('thead', {}, row('th', lines[at]));
  for (at += 2; at < lines.length && lines[at].includes('|') && lines[at].trim(); at += 1) body.append(row('td', lines[at]));
  parent.append(el('div', { className: 'table', tabIndex: 0 }, el('table', {}, head, body)));
  return at;
}

const cells = (line) => line.trim().replace(/^\||\|$/g, '').split('|').map((cell) => cell.trim());

function paragraph(lines, at, parent, depth) {
  const begin = at;
  for (at += 1; at < lines.length && lines[at].trim() && !(starts(lines[at]) && depth < MAX_DEPTH); at += 1);
  parent.append(inlined('p', lines.slice(begin, at).map((line) => line.trimStart()).join('\n')));
  return at;
}

function inlined(name, text) {
  const node = el(name);
  inline(text, node, 0);
  return node;
}

function inline(text, parent, depth) {
  const scan = new RegExp(SPECIAL.source, 'g');
  let done = 0;
  for (let match; (match = scan.exec(text)); ) {
    const [node, end] = span(text, match, depth);
    if (node === null) continue;
    parent.append(text.slice(done, match.index), node);
    done = scan.lastIndex = end;
  }
  parent.append(text.slice(done));
}

// The element of a span and where it ends; null where the mark is mere text.
function span(text, match, depth) {
  const mark = match[0];
  const inside = match.index + mark.length;
  if (mark === '\n') return [el('br'), inside];
  if (mark[0] === '\\') return [document.createTextNode(mark[1]), inside];
  if (mark[0] === 'h') {
    const address = withoutFullStop(mark);
    return [link(address, null, depth), match.index + address.length];
  }
  if (depth >= MAX_DEPTH) return [null, 0];
  if (mark[0] === '`') return codeSpan(text, mark, inside);
  if (mark.endsWith('[')) return linkSpan(text, inside, depth);
  const end = near(text, mark, inside);
  const isWordInside = mark[0] === '_' && (/\w/.test(text[match.index - 1] ?? '') || /\w/.test(text[end + mark.length] ?? ''));
  if (end <= inside || isWordInside || /\s/.test(text[inside]) || /\s/.test(text[end - 1])) return [null, 0];
  const node = el(mark === '~~' ? 's' : mark.length === 1 ? 'em' : 'strong');
  inline(text.slice(inside, end), mark.length === 3 ? node.appendChild(el('em')) : node, depth + 1);
  return [node, end + mark.length];
}

function withoutFullStop(address) {
  let end = address.length;
  while ('.,;:!?'.includes(address[end - 1])) end -= 1;
  return address.slice(0, end);
}

function near(text, mark, from) {
  const found = text.slice(from, from + WINDOW).indexOf(mark);
  return found < 0 ? -1 : from + found;
}

function codeSpan(text, mark, inside) {
  const end = near(text, mark, inside);
  if (end < 0 || text[end + mark.length] === '`') return [null, 0];
  return [el('code', {}, text.slice(inside, end).replace(/^ (.+) $/, '$1')), end + mark.length];
}

function linkSpan(text, inside, depth) {
  const middle = near(text, '](', inside);
  const end = middle < 0 ? -1 : near(text, ')', middle + 2);
  if (end < 0) return [null, 0];
  const address = text.slice(middle + 2, end).trim().split(/\s/)[0];
  const label = text.slice(inside, middle);
  return [link(address, label || address, depth), end + 1];
}

function link(address, label, depth) {
  if (!/^(https?:\/\/|mailto:)/i.test(address)) return el('span', { title: address }, label ?? address);
  const node = el('a', { href: address, target: '_blank', rel: 'noopener noreferrer nofollow' });
  if (label === null) node.append(address);
  else inline(label, node, MAX_DEPTH - 1 > depth ? MAX_DEPTH - 1 : depth);
  return node;
}
