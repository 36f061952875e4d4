// What buttons and keys do.
import { t } from './i18n.js';
import {
  accept, asked, fileOf, frames, lastSeed, model, onStage, painters, picked, post, recipeOf, remove, running,
} from './server.js';
import { change, close, EMPTY, open, replace, say, settings, sized, startFrom, steerBy, view } from './state.js';

const LARGEST_START = 2048;

/** Runs something that asks the server, and shows what it refuses. */
export async function attempt(act) {
  try {
    return await act();
  } catch (error) {
    say(error.status ? error.message : t('offline'), { kind: 'error' });
    return null;
  }
}

// Browsers have randomUUID only where the page comes from this machine or over TLS.
const newId = () => crypto.randomUUID?.() ?? `page-${Date.now()}-${Math.random().toString(36).slice(2)}`;

/** Sends a job. The id is chosen here, so that sending twice makes one job. */
export const submit = (wanted, id = newId()) =>
  post('jobs', { ...wanted, id, client: 'studio' });

export async function generate() {
  if (!model.peek()) return;
  const job = await attempt(() => submit(asked()));
  if (!job) return;
  picked.value = null;
  view.value = 'create';
  accept(job);
}

export const cancel = (id) => attempt(() => remove(`jobs/${id}`));

export function cancelCurrent() {
  const frame = onStage.peek();
  const job = frame && !frame.key && frame.job.state === 'queued' ? frame.job : running.peek();
  if (job) cancel(job.id);
}

export const sendAgain = (job) => attempt(async () => {
  accept(await submit({ model: job.model, request: job.request }));
  picked.value = null;
});

/** Moves an image to the trash, and offers to take it out again. */
export const removeImage = (key) => attempt(async () => {
  await remove(`images/${key}`);
  const restore = () => attempt(() => post(`images/${key}/restore`));
  say(t('deleted'), { action: { label: t('undo'), run: restore } });
});

export function removeShown() {
  const frame = onStage.peek();
  if (view.peek() === 'create' && frame?.key) removeImage(frame.key);
}

/** Goes along the filmstrip: 1 is the next older one. */
export function showNext(way) {
  const list = frames.peek();
  const at = list.findIndex(({ id }) => id === onStage.peek()?.id);
  const next = list[at + way];
  if (next) picked.value = next.id;
}

export const again = () => change({ seed: lastSeed.peek() });

const CONTROLS = ['negative_prompt', 'steps', 'guidance_scale', 'scheduler', 'seed', 'width', 'height', 'strength',
  'adapters', 'embeddings', 'prompt_syntax', 'spacing'];
const first = (value) => (Array.isArray(value) ? value[0] : value);

/** Takes a request's settings over. `name`: the model that it says it was made with. */
export function useSettings(request, name) {
  const { prompt, count, ...rest } = request;
  const fields = { prompt: first(prompt) ?? '' };
  const extra = {};
  const before = settings.peek();
  for (const [field, value] of Object.entries(rest)) {
    if (value == null) continue;
    if (CONTROLS.includes(field)) fields[field] = Array.isArray(EMPTY[field]) ? value : first(value);
    else extra[field] = value;
  }
  if (painters.peek().some((one) => one.name === name)) fields.model = name;
  replace({ ...fields, extra });
  view.value = 'create';
  say(t('settings_used'), { action: { label: t('undo'), run: () => change(before) } });
}

/** A picture's size, and what to draw from if it is larger than any model wants: a smaller copy. */
async function measured(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  const { naturalWidth: width, naturalHeight: height } = image;
  const share = LARGEST_START / Math.max(width, height);
  if (share >= 1) return { url, width, height };
  const canvas = document.createElement('canvas');
  Object.assign(canvas, { width: Math.round(width * share), height: Math.round(height * share) });
  canvas.getContext('2d').drawImage(image, 0, 0, canvas.width, canvas.height);
  return { url: canvas.toDataURL('image/png'), width: canvas.width, height: canvas.height };
}

const dataUrl = (file) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });

/** Begins from a picture, at the model's own number of pixels in the picture's ratio. */
function begin(picture) {
  startFrom(picture);
  const own = { width: model.peek()?.width ?? 512, height: model.peek()?.height ?? 512 };
  change({ ...sized([picture.width, picture.height], own), extend: null });
  view.value = 'create';
  close();
  say(t('start_set'));
}

async function withPicture(file, use) {
  try {
    use({ ...(await measured(await dataUrl(file))), name: file.name });
  } catch {
    say(t('no_picture', { name: file.name }), { kind: 'error' });
  }
}

export const beginWithFile = (file) => withPicture(file, begin);

export const steerWithFile = (model, file) => withPicture(file, (picture) => steerBy(model, picture));

export const beginWithImage = (key, name) => attempt(async () => {
  begin({ ...(await measured(fileOf(key))), key, name });
});

/** A picture that was dropped, pasted or chosen: offers its settings if it has any, else begins from it. */
export async function receive(file) {
  if (!file?.type.startsWith('image/')) return say(t('no_picture', { name: file?.name ?? '' }), { kind: 'error' });
  let recipe = null;
  try {
    recipe = await recipeOf(file);
  } catch (refused) {
    if (refused.code !== 'no_recipe') return say(refused.status ? refused.message : t('offline'), { kind: 'error' });
  }
  return recipe ? open('dropped', { file, recipe }) : beginWithFile(file);
}

export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    say(t('copied'));
    return true;
  } catch {
    return false;
  }
}
