// The page's state. What survives a reload: small values in localStorage, which may be full or forbidden, and
// pictures in IndexedDB.
import { computed, signal } from '@preact/signals';

const PREFIX = 'sfumato.';

export function saved(name, fallback = null) {
  try {
    return JSON.parse(localStorage.getItem(PREFIX + name)) ?? fallback;
  } catch {
    return fallback;
  }
}

export function save(name, value) {
  try {
    localStorage.setItem(PREFIX + name, JSON.stringify(value));
  } catch {
    // Without storage the page works as well, until it is closed.
  }
}

const database = () =>
  new Promise((resolve, reject) => {
    const request = indexedDB.open('sfumato', 1);
    request.onupgradeneeded = () => request.result.createObjectStore('drafts');
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

async function transact(mode, act) {
  try {
    const opened = await database();
    return await new Promise((resolve, reject) => {
      const request = act(opened.transaction('drafts', mode).objectStore('drafts'));
      request.onsuccess = () => resolve(request.result);
      request.onerror = () => reject(request.error);
    });
  } catch {
    return undefined;
  }
}

export const savedDraft = (name) => transact('readonly', (store) => store.get(name));
export const saveDraft = (name, value) =>
  transact('readwrite', (store) => (value == null ? store.delete(name) : store.put(value, name)));

// What is on the screen, beside what the server knows: view, dialog, messages, and preferences that are remembered.

export const view = signal('create');
/** The dialog that is open, {name, ...}, or null. */
export const dialog = signal(null);
export const open = (name, rest = {}) => (dialog.value = { name, ...rest });
export const close = () => (dialog.value = null);

const DEFAULTS = { theme: 'system', advanced: false, negative: false, panel: true, letters: true };
export const preferences = signal({ ...DEFAULTS, ...saved('preferences') });
export function prefer(fields) {
  preferences.value = { ...preferences.peek(), ...fields };
  save('preferences', preferences.peek());
}

/** Messages at the edge of the screen: {id, text, kind, action: {label, run}}. */
export const messages = signal([]);
let count = 0;

/** Shows a message for some seconds; one with an action stays longer, an error until it is closed. */
export function say(text, { kind = 'info', action } = {}) {
  const message = { id: (count += 1), text, kind, action };
  messages.value = [...messages.peek().slice(-2), message];
  if (kind !== 'error') setTimeout(() => dismiss(message.id), action ? 12000 : 5000);
  return message.id;
}
export const dismiss = (id) => (messages.value = messages.peek().filter((one) => one.id !== id));

/** What a screen reader says next. */
export const announcement = signal('');

// What to generate: one immutable value, its history, and its memory across reloads.

// The names are those of GenerateRequest; null is the model's own choice.
export const EMPTY = Object.freeze({
  model: null, prompt: '', negative_prompt: '', steps: null, guidance_scale: null, scheduler: null, seed: null,
  count: 1, width: null, height: null, strength: null, adapters: [], embeddings: [], controls: [], prompt_syntax: null,
  spacing: null, draft: null, compute_unit: null,
  // Pixels to add on the left, top, right and bottom of the start image.
  extend: null,
  // Fields of a recipe that the page has no control for; they are sent as they came.
  extra: {},
});
// Changes of one field that follow each other this closely (ms) are undone together, as when a slider is dragged.
const TOGETHER = 800;
const MOST_UNDONE = 100;

/** How much a start image is changed where nobody said. */
export const usualStrength = () => (mask.value || settings.value.extend ? 1 : 0.6);

const known = (value) => Object.fromEntries(Object.entries(value ?? {}).filter(([name]) => name in EMPTY));

export const settings = signal({ ...EMPTY, ...known(saved('settings')) });
/** The picture to start from, {url, key?, name, width, height}; what of it to repaint, {url, edge}, white on black. */
export const start = signal(null);
export const mask = signal(null);
/** The pictures that controls read, {url, name} by the control's model. */
export const steering = signal({});

const past = signal([]);
const future = signal([]);
export const canUndo = computed(() => past.value.length > 0);
export const canRedo = computed(() => future.value.length > 0);
let last = { fields: '', time: 0 };

const show = (value) => {
  settings.value = value;
  save('settings', value);
};

/** Changes some of the settings, so that it can be undone. */
export function change(fields) {
  const before = settings.peek();
  const after = { ...before, ...known(fields) };
  if (Object.keys(after).every((name) => after[name] === before[name])) return;
  const changed = Object.keys(fields).join();
  if (changed !== last.fields || Date.now() - last.time > TOGETHER) {
    past.value = [...past.peek(), before].slice(-MOST_UNDONE);
    future.value = [];
  }
  last = { fields: changed, time: Date.now() };
  show(after);
}

/** All settings at once: those that are not given get their default, except the model. */
export const replace = (fields) => change({ ...EMPTY, model: settings.peek().model, ...fields });

function step(from, to) {
  if (!from.peek().length) return;
  to.value = [...to.peek(), settings.peek()];
  show(from.peek().at(-1));
  from.value = from.peek().slice(0, -1);
  last = { fields: '', time: 0 };
}
export const undo = () => step(past, future);
export const redo = () => step(future, past);

/** The settings that differ from the defaults. */
export function chosen(value) {
  const differs = ([name, own]) => JSON.stringify(own) !== JSON.stringify(EMPTY[name]);
  return Object.fromEntries(Object.entries(value).filter(differs));
}

export function startFrom(picture) {
  start.value = picture;
  saveDraft('start', picture);
  paintOver(null);
}

export function paintOver(painted) {
  mask.value = painted;
  saveDraft('mask', painted);
}

export function steerBy(model, picture) {
  steering.value = { ...steering.peek(), [model]: picture };
  saveDraft('steering', steering.peek());
}

/** Brings back the pictures of the last visit. */
export async function restoreDrafts() {
  start.value ??= (await savedDraft('start')) ?? null;
  mask.value ??= (await savedDraft('mask')) ?? null;
  steering.value = (await savedDraft('steering')) ?? {};
}

// Sizes by ratio: about as many pixels as the model was trained on, both sides multiples of 8.
export const RATIOS = [[1, 1], [4, 3], [3, 4], [3, 2], [2, 3], [16, 9], [9, 16]];
const MULTIPLE = 8;

const round = (value) => Math.max(MULTIPLE, Math.round(value / MULTIPLE) * MULTIPLE);

/** Width and height of a ratio, for a model of this size. */
export function sized([wide, high], { width, height }) {
  const unit = Math.sqrt((width * height) / (wide * high));
  return { width: round(wide * unit), height: round(high * unit) };
}

/** The ratio of a size, as one of RATIOS; null if it is none of them. */
export function ratioOf({ width, height }, model) {
  return RATIOS.find((ratio) => {
    const one = sized(ratio, model);
    return one.width === width && one.height === height;
  }) ?? null;
}

// Presets: whole settings under a name, without prompt and seed.
export const presets = signal(saved('presets', []));
const keep = (list) => save('presets', (presets.value = list));

export function savePreset(name) {
  const { prompt, negative_prompt, seed, ...rest } = settings.peek();
  keep([...presets.peek().filter((one) => one.name !== name), { name, settings: chosen(rest) }]);
}
export const removePreset = (name) => keep(presets.peek().filter((one) => one.name !== name));

export function applyPreset(name) {
  const found = presets.peek().find((one) => one.name === name);
  const { prompt, negative_prompt, seed, model } = settings.peek();
  if (found) replace({ prompt, negative_prompt, seed, model, ...found.settings });
}

// A link holds settings after "#", which no server is ever sent.
export function link() {
  const fields = Object.entries(chosen(settings.peek())).map(([name, value]) =>
    [name, typeof value === 'string' ? value : JSON.stringify(value)]);
  return `${location.origin}${location.pathname}#${new URLSearchParams(fields)}`;
}

const TEXTS = ['model', 'prompt', 'negative_prompt', 'scheduler', 'prompt_syntax', 'spacing', 'compute_unit'];

/** The settings of a link; null if it holds none. What has the wrong type is ignored. */
export function fromLink(hash) {
  const found = {};
  for (const [name, text] of new URLSearchParams(hash.replace(/^#/, ''))) {
    if (TEXTS.includes(name)) found[name] = text;
    else if (name in LISTS) found[name] = listOf(text, LISTS[name]);
    else if (name in EMPTY && name !== 'extra' && Number.isFinite(Number(text))) found[name] = Number(text);
  }
  return Object.keys(found).length ? found : null;
}

const LISTS = {
  adapters: ({ file, weight }) => typeof file === 'string' && Number.isFinite(weight),
  embeddings: ({ file }) => typeof file === 'string',
  controls: ({ model, scale }) => typeof model === 'string' && Number.isFinite(scale),
  extend: Number.isFinite,
};

function listOf(text, fits) {
  try {
    return JSON.parse(text).filter(fits);
  } catch {
    return [];
  }
}
