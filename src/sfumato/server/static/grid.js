// The same settings with one or two of them varied: a table of images.
import { useState } from 'preact/hooks';
import { attempt, submit } from './actions.js';
import { thumbOf } from './api.js';
import { Dialog } from './dialogs.js';
import { Choice, TextInput } from './fields.js';
import { html } from './html.js';
import { number, t } from './i18n.js';
import { accept, jobs, live } from './jobs.js';
import { asked } from './plan.js';
import { open, say } from './screen.js';
import { settings, start } from './settings.js';
import { save, saved } from './storage.js';
import { altOf } from './stage.js';

const MOST = 100;
const SEEDS = 2 ** 31;
// What may be varied, and how its values are read; prompts: the first value is looked for and becomes each of them.
const AXES = { steps: Number, guidance_scale: Number, seed: Number, strength: Number, scheduler: String, model: String,
  prompt: String };
const NAMES = { guidance_scale: 'guidance' };

const valuesOf = ({ name, text }) => {
  if (!name) return [null];
  const values = text.split(',').map((one) => one.trim()).filter(Boolean).map(AXES[name]);
  return values.every((value) => typeof value === 'string' || Number.isFinite(value)) ? values : [];
};

const varied = (now, { name, values }, value) => {
  if (!name) return now;
  return { ...now, [name]: name === 'prompt' ? now.prompt.replaceAll(values[0], value) : value };
};

function Axis({ label, axis, onChange }) {
  const names = Object.keys(AXES).filter((name) => name !== 'strength' || start.value);
  const shown = names.map((name) => [name, t(NAMES[name] ?? name)]);
  return html`<div class="row axis">
    <${Choice} label=${label} value=${axis.name} options=${[['', t('nothing')], ...shown]}
      onChange=${(name) => onChange({ ...axis, name })} />
    <${TextInput} label=${t('values')} value=${axis.text} disabled=${!axis.name}
      placeholder=${t(axis.name === 'prompt' ? 'values_prompt' : 'values_hint')}
      onInput=${(text) => onChange({ ...axis, text })} />
  </div>`;
}

function Cell({ id, keys }) {
  const job = jobs.value.get(id);
  if (!job) return html`<td></td>`;
  const now = live.value.get(id);
  const [key] = job.images;
  if (key) {
    return html`<td><button type="button" class="frame" aria-label=${altOf(job)}
      onClick=${() => open('viewer', { keys, key })}><img src=${thumbOf(key)} alt="" /></button></td>`;
  }
  const share = now?.total ? number(now.step / now.total, { style: 'percent' }) : '';
  return html`<td><span class="frame ${job.state}">${share || t(`state_${job.state}`)}</span></td>`;
}

function Table({ x, y, ids }) {
  const keys = ids.flat().map((id) => jobs.value.get(id)?.images[0]).filter(Boolean);
  return html`<div class="scroll" tabindex="0" role="region" aria-label=${t('grid')}><table class="cells">
    ${x.name && html`<thead><tr>${y.name && html`<td></td>`}
      ${x.values.map((value) => html`<th scope="col" key=${value} dir="auto">${value}</th>`)}</tr></thead>`}
    <tbody>${ids.map((row, at) => html`<tr key=${row[0]}>
      ${y.name && html`<th scope="row" dir="auto">${y.values[at]}</th>`}
      ${row.map((id) => html`<${Cell} key=${id} id=${id} keys=${keys} />`)}</tr>`)}</tbody>
  </table></div>`;
}

export function Grid() {
  const [grid, setGrid] = useState(saved('grid'));
  const [x, setX] = useState(grid?.x ?? { name: 'steps', text: '5, 10, 20' });
  const [y, setY] = useState(grid?.y ?? { name: null, text: '' });
  const size = valuesOf(x).length * valuesOf(y).length;
  const make = async () => {
    const across = { ...x, values: valuesOf(x) };
    const down = { ...y, values: valuesOf(y) };
    const name = `grid-${Date.now().toString(36)}`;
    // All cells share a seed, so that what differs is what was varied.
    const base = { ...settings.peek(), count: 1, seed: settings.peek().seed ?? Math.floor(Math.random() * SEEDS) };
    const ids = down.values.map((_, at) => across.values.map((__, of) => `${name}-${at}-${of}`));
    const next = { x: across, y: down, ids };
    for (const [at, below] of down.values.entries()) {
      for (const [of, beside] of across.values.entries()) {
        const cell = varied(varied(base, across, beside), down, below);
        const { model, ...rest } = asked(cell);
        const job = await attempt(() => submit({ ...rest, model: cell.model ?? model }, ids[at][of]));
        if (!job) return;
        accept(job);
      }
    }
    setGrid(next);
    save('grid', next);
    say(t('grid_queued', { n: size }));
  };
  return html`<${Dialog} title=${t('grid')} wide>
    <form onSubmit=${(event) => (event.preventDefault(), make())}>
      <${Axis} label=${t('axis_x')} axis=${x} onChange=${setX} />
      <${Axis} label=${t('axis_y')} axis=${y} onChange=${setY} />
      <footer class="dialog-foot"><span class="hint">${size > MOST && t('grid_limit', { n: MOST })}</span>
        <button type="submit" class="primary" disabled=${size < 1 || size > MOST || !(x.name || y.name)}>
          ${t('make_images', { n: size })}</button></footer>
    </form>
    ${grid && html`<${Table} ...${grid} />`}
  </${Dialog}>`;
}
