// The settings: few of them in sight, the rest one click away and left as they were.
import { useRef, useState } from 'preact/hooks';
import { again, copy, receive, steerWithFile } from './actions.js';
import { Check, Choice, html, Icon, IconButton, NumberInput, Section, Slider, TextInput } from './fields.js';
import { t } from './i18n.js';
import {
  abilities, lastSeed, loadModels, model, models, painters, plan, preprocessors, samplers, spacings,
} from './server.js';
import {
  applyPreset, canRedo, canUndo, change, chosen, link, mask, open, paintOver, prefer, preferences, presets, ratioOf,
  RATIOS, redo, removePreset, replace, savePreset, settings, sized, start, startFrom, steering, undo, usualStrength,
} from './state.js';

const LARGEST_SEED = 2 ** 32 - 1;
const SYNTAXES = ['plain', 'a1111', 'comfyui'];

function ModelChoice() {
  const kinds = { 'core-ml': 'Core ML' };
  const options = painters.value.map(({ name, kind }) => [name, kinds[kind] ? `${name} (${kinds[kind]})` : name, true]);
  const units = model.value?.compute_units ?? [];
  return html`<div class="row">
    <${Choice} label=${t('model')} value=${model.value?.name} options=${options}
      onChange=${(name) => change({ model: name, width: null, height: null, steps: null, guidance_scale: null })} />
    <${IconButton} icon="again" label=${t('find_models')} onClick=${() => loadModels(true)} />
  </div>
  ${units.length > 1 && html`<${Choice} label=${t('compute_unit')} value=${settings.value.compute_unit}
    options=${[['', t('models_own')], ...units.map((name) => [name, t(`unit_${name}`)])]}
    onChange=${(unit) => change({ compute_unit: unit })} />`}`;
}

const own = () => ({ width: model.value?.width ?? 512, height: model.value?.height ?? 512 });

function Size() {
  const { width, height } = settings.value;
  const now = { width: width ?? own().width, height: height ?? own().height };
  const ratio = ratioOf(now, own());
  return html`<fieldset class="field">
    <legend>${t('size')}</legend>
    <div class="ratios">${RATIOS.map((one) => html`<button type="button" key=${one} aria-pressed=${one === ratio}
      translate=${false} aria-label=${one.join(':')} onClick=${() => change(sized(one, own()))}>
      <i style=${{ aspectRatio: one.join(' / ') }} class=${one[0] < one[1] && 'tall'}></i>${one.join(':')}</button>`)}
    </div>
    <div class="row pixels">
      <${NumberInput} aria-label=${t('width')} value=${now.width} min=${8} max=${8192} step=${8}
        onChange=${(value) => change({ width: Math.round(value / 8) * 8, height: now.height })} />
      <span aria-hidden="true">×</span>
      <${NumberInput} aria-label=${t('height')} value=${now.height} min=${8} max=${8192} step=${8}
        onChange=${(value) => change({ height: Math.round(value / 8) * 8, width: now.width })} />
    </div>
  </fieldset>`;
}

const Seed = () => html`<div class="field">
  <div class="field-head"><label for="seed">${t('seed')}</label>
    <${IconButton} icon="again" class="tiny" label=${t('seed_again')} disabled=${lastSeed.value == null}
      onClick=${again} />
    ${settings.value.seed != null && html`<${IconButton} icon="close" class="tiny" label=${t('seed_random')}
      onClick=${() => change({ seed: null })} />`}
    <${NumberInput} id="seed" class="seed" value=${settings.value.seed} min=${0} max=${LARGEST_SEED} step=${1} empty
      placeholder=${t('random')} onChange=${(seed) => change({ seed: seed && Math.round(seed) })} /></div>
</div>`;

/** A button that asks for a picture. */
function Chooser({ label, onFile, children, ...rest }) {
  const input = useRef();
  const take = (event) => {
    onFile(event.target.files[0]);
    event.target.value = '';
  };
  return html`<input type="file" ref=${input} accept="image/png,image/jpeg,image/webp" aria-label=${label} hidden
      onChange=${take} />
    <button type="button" ...${rest} onClick=${() => input.current.click()}>${children}</button>`;
}

/** How far the start image is continued beyond its sides, at about as many pixels as the model draws. */
function Extend() {
  const sides = settings.value.extend ?? [0, 0, 0, 0];
  const set = (place, value) => {
    const extend = sides.with(place, Math.round(value));
    const { width, height } = start.value;
    const whole = [width + extend[0] + extend[2], height + extend[1] + extend[3]];
    change({ ...sized(whole, own()), extend: extend.some(Boolean) ? extend : null });
  };
  return html`<fieldset class="row">
    <legend>${t('extend')}</legend>
    ${['left', 'top', 'right', 'bottom'].map((name, place) => html`<label key=${name}>${t(name)}
      <${NumberInput} value=${sides[place]} min=${0} max=${4096} step=${8}
        onChange=${(value) => set(place, value)} /></label>`)}
  </fieldset>`;
}

function Start() {
  const picture = start.value;
  return html`<div class="field" role="group" aria-label=${t('start_image')}>
    <div class="field-head"><span class="label">${t('start_image')}</span>
      ${picture && html`<${IconButton} icon="close" class="tiny" label=${t('remove_start')}
        onClick=${() => startFrom(null)} />`}</div>
    ${!picture && html`<${Chooser} class="drop-zone" label=${t('choose_picture')} onFile=${receive}>
      <${Icon} name="image" />${t('drop_or_choose')}</${Chooser}>`}
    ${picture && html`
      <div class="start"><img src=${picture.url} alt=${picture.name || t('start_image')} />
        ${mask.value && html`<img src=${mask.value.url} alt="" class="veil" />`}</div>
      <${Slider} label=${t('strength')} value=${settings.value.strength} own=${usualStrength()} min=${0} max=${1}
        step=${0.05} onChange=${(strength) => change({ strength })} />
      ${abilities.value.mask && html`<div class="row">
        <button type="button" onClick=${() => open('mask')}><${Icon} name="brush" />
          ${t(mask.value ? 'edit_mask' : 'paint_mask')}</button>
        ${mask.value && html`<button type="button" onClick=${() => paintOver(null)}>${t('remove_mask')}</button>`}
      </div>
      <${Extend} />`}`}
  </div>`;
}

/** Models that change or steer the one that draws: a row for each, and a choice of those that are left. */
function Worn({ field, kind, label, fresh, by = 'file', Row }) {
  const worn = settings.value[field];
  const free = models.value.filter((one) => one.kind === kind && !worn.some((other) => other[by] === one.name));
  const set = (list) => change({ [field]: list });
  return (free.length > 0 || worn.length > 0) && html`<div class="field">
    ${worn.map((one, place) => html`<div class="row worn" key=${one[by]}>
      <${Row} one=${one} update=${(fields) => set(worn.with(place, { ...one, ...fields }))} />
      <${IconButton} icon="close" class="tiny" label=${t('remove_named', { name: one[by] })}
        onClick=${() => set(worn.filter((other) => other !== one))} /></div>`)}
    ${free.length > 0 && html`<${Choice} label=${label} value=""
      options=${[['', t('choose')], ...free.map(({ name }) => [name, name, true])]}
      onChange=${(name) => name && set([...worn, { [by]: name, ...fresh }])} />`}
  </div>`;
}

const Adapter = ({ one, update }) => html`<${Slider} label=${one.file} value=${one.weight} min=${-1} max=${2}
  step=${0.05} onChange=${(weight) => update({ weight })} />`;

const Embedding = ({ one }) => html`<span class="grow ellipsis" translate=${false}>${one.file}</span>`;

function Control({ one, update }) {
  const picture = steering.value[one.model];
  return html`<div class="field">
    <${Slider} label=${one.model} value=${one.scale} min=${0} max=${2} step=${0.05}
      onChange=${(scale) => update({ scale })} />
    <${Chooser} class="drop-zone" label=${t('control_picture', { name: one.model })}
      onFile=${(file) => file && steerWithFile(one.model, file)}>
      ${picture ? html`<img src=${picture.url} alt=${picture.name} />`
        : html`<${Icon} name="image" />${t('control_picture', { name: one.model })}`}</${Chooser}>
    <${Choice} label=${t('preprocessor')} value=${one.preprocessor} options=${preprocessors.value.map((name) =>
      (name === 'none' ? ['', t('nothing')] : [name, name, true]))}
      onChange=${(name) => update({ preprocessor: name ?? undefined })} />
  </div>`;
}

/** What a recipe asks for and no control shows. */
function Extra() {
  const extra = Object.entries(settings.value.extra);
  if (!extra.length) return null;
  const without = (name) => Object.fromEntries(extra.filter(([other]) => other !== name));
  return html`<div class="field"><span class="label">${t('from_recipe')}</span>
    <ul class="extra">${extra.map(([name, value]) => html`<li key=${name}>
      <code dir="auto">${name}: ${JSON.stringify(value).slice(0, 60)}</code>
      <${IconButton} icon="close" class="tiny" label=${t('remove_named', { name })}
        onClick=${() => change({ extra: without(name) })} /></li>`)}</ul></div>`;
}

function Advanced() {
  const now = settings.value;
  const planned = plan.value ?? {};
  const suggested = model.value?.suggested ?? {};
  const schedulers = [['', t('models_own')], ...samplers.value.map(({ name }) => [name, name, true])];
  const about = samplers.value.find(({ name }) => name === now.scheduler)?.about;
  return html`<${Section} title=${t('advanced')} open=${preferences.value.advanced}
    onToggle=${(advanced) => prefer({ advanced })}>
    <${Check} label=${t('draft')} checked=${now.draft} onChange=${(on) => change({ draft: on ? 1 : null })} />
    <${Slider} label=${t('steps')} value=${now.steps} own=${suggested.steps ?? planned.steps} min=${1} max=${100}
      typed=${1000} step=${1} onChange=${(value) => change({ steps: Math.round(value) })} />
    <${Slider} label=${t('guidance')} value=${now.guidance_scale}
      own=${suggested.guidance_scale ?? planned.guidance_scale} min=${0} max=${20} typed=${100} step=${0.5}
      onChange=${(value) => change({ guidance_scale: value })} />
    <${Choice} label=${t('scheduler')} value=${now.scheduler} options=${schedulers} hint=${about}
      onChange=${(scheduler) => change({ scheduler })} />
    <${Choice} label=${t('spacing')} value=${now.spacing}
      options=${[['', t('schedulers_own')], ...spacings.value.map((name) => [name, name, true])]}
      onChange=${(spacing) => change({ spacing })} />
    <${Choice} label=${t('syntax')} value=${now.prompt_syntax ?? 'plain'}
      options=${SYNTAXES.map((name) => [name, t(`syntax_${name}`)])}
      onChange=${(name) => change({ prompt_syntax: name === 'plain' ? null : name })} />
    <${Worn} field="adapters" kind="lora" label=${t('add_lora')} fresh=${{ weight: 1 }} Row=${Adapter} />
    <${Worn} field="embeddings" kind="embedding" label=${t('add_embedding')} Row=${Embedding} />
    <${Worn} field="controls" kind="controlnet" label=${t('add_control')} by="model" fresh=${{ scale: 1 }}
      Row=${Control} />
    <${Extra} />
  </${Section}>`;
}

function Presets() {
  const [name, setName] = useState('');
  const store = () => {
    savePreset(name.trim());
    setName('');
  };
  return html`<${Section} title=${t('presets')} open=${preferences.value.presets}
    onToggle=${(shown) => prefer({ presets: shown })}>
    <ul class="presets">${presets.value.map((one) => html`<li key=${one.name} class="row">
      <button type="button" class="grow" dir="auto" onClick=${() => applyPreset(one.name)}>${one.name}</button>
      <${IconButton} icon="trash" label=${t('remove_preset', { name: one.name })}
        onClick=${() => removePreset(one.name)} />
    </li>`)}</ul>
    <form class="row" onSubmit=${(event) => (event.preventDefault(), store())}>
      <${TextInput} label=${t('preset_name')} value=${name} onInput=${setName} maxlength="60" />
      <button type="submit" disabled=${!name.trim()}>${t('save')}</button>
    </form>
    <p class="hint">${t('presets_hint')}</p>
  </${Section}>`;
}

const share = async () => (await copy(link())) || open('share');

export const Panel = () => html`
  <div class="tools">
    <${IconButton} icon="undo" label=${t('undo_settings')} disabled=${!canUndo.value} onClick=${undo} />
    <${IconButton} icon="redo" label=${t('redo_settings')} disabled=${!canRedo.value} onClick=${redo} />
    <span class="grow"></span>
    <${IconButton} icon="grid" label=${t('grid')} onClick=${() => open('grid')} />
    <${IconButton} icon="link" label=${t('share')} onClick=${share} />
  </div>
  <${ModelChoice} /><${Size} />
  <div class="field-head"><label for="count">${t('count')}</label>
    <${NumberInput} id="count" value=${settings.value.count} min=${1} max=${100} step=${1}
      onChange=${(count) => change({ count: Math.round(count) })} /></div>
  <${Seed} /><${Start} /><${Advanced} /><${Presets} />
  ${Object.keys(chosen(settings.value)).length > 0 && html`<button type="button" class="link reset"
    onClick=${() => replace({})}>${t('reset')}</button>`}`;
