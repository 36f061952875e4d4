// What the server has: models, schedulers, the worker; and what the settings would take on it.
import { computed, effect, signal } from '@preact/signals';
import { get, post } from './api.js';
import { mask, settings, start, usualStrength } from './settings.js';

const PAUSE = 250;
const AGAIN = 1500;

export const worker = signal({ state: 'starting' });
export const abilities = signal({ mask: false });
export const models = signal([]);
export const samplers = signal([]);
export const spacings = signal([]);
const fallback = signal(null);

export const painters = computed(() => models.value.filter(({ kind }) => kind === 'checkpoint' || kind === 'core-ml'));
export const loras = computed(() => models.value.filter(({ kind }) => kind === 'lora'));
/** The chosen model, or the default one where none is chosen or the chosen one is not there any more. */
export const model = computed(() => {
  const named = (name) => painters.value.find((one) => one.name === name);
  return named(settings.value.model) ?? named(fallback.value) ?? painters.value[0] ?? null;
});

export async function loadModels(look = false) {
  const told = await get(`models${look ? '?look=true' : ''}`);
  fallback.value = told.default;
  models.value = told.models;
}

export async function loadFacts() {
  const [health, known] = await Promise.all([get('health'), get('samplers'), loadModels()]);
  worker.value = health.worker;
  abilities.value = { mask: Boolean(health.mask) };
  samplers.value = known.samplers;
  spacings.value = known.spacings;
}

const PASSED_ON = ['steps', 'guidance_scale', 'scheduler', 'spacing', 'seed', 'width', 'height'];

/** The settings as the server wants them: {model, request, compute_unit?}. What has its default is absent. */
export function asked(value = settings.peek(), picture = start.peek(), painted = mask.peek()) {
  const request = { prompt: value.prompt, count: value.count, ...value.extra };
  if (value.negative_prompt) request.negative_prompt = value.negative_prompt;
  if (value.prompt_syntax) request.prompt_syntax = value.prompt_syntax;
  for (const name of PASSED_ON) if (value[name] != null) request[name] = value[name];
  if (value.adapters.length) request.adapters = value.adapters;
  if (picture) request.image = picture.key ?? picture.url;
  if (picture && painted && abilities.peek().mask) request.mask = { file: painted.url, edge: painted.edge };
  if (request.image) request.strength = value.strength ?? usualStrength();
  const unit = model.peek()?.compute_units?.includes(value.compute_unit) ? { compute_unit: value.compute_unit } : {};
  return { model: model.peek()?.name, request, ...unit };
}

/** PLAN for the settings, or {fits: false, message}; null until the worker is there. */
export const plan = signal(null);

/** Plans anew whenever the settings have stayed the same for a moment. */
export function keepPlanning() {
  let timer;
  let newest = 0;
  const ask = async () => {
    const turn = (newest += 1);
    let told;
    try {
      const { compute_unit, ...planned } = asked();
      told = await post('plan', planned);
    } catch (refused) {
      if (refused.status === 503 || !refused.status) {
        timer = setTimeout(ask, AGAIN);
        return;
      }
      told = { fits: false, message: refused.message };
    }
    if (turn !== newest) return;
    plan.value = told;
    // Tokens are counted by the model, which may still be on its way.
    if (told.tokens === null) timer = setTimeout(ask, AGAIN);
  };
  effect(() => {
    const now = [settings.value, start.value, mask.value, model.value, worker.value.state];
    clearTimeout(timer);
    if (now[3]) timer = setTimeout(ask, PAUSE);
  });
}
