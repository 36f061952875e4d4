// The larger tools. What a mask repaints, painted with a pointer, with the keyboard, or as a rectangle in numbers.
import { useEffect, useRef, useState } from 'preact/hooks';
import { attempt, submit } from './actions.js';
import { Choice, Dialog, html, Icon, NumberInput, Slider, TextInput } from './fields.js';
import { number, t } from './i18n.js';
import { accept, asked, jobs, live, thumbOf } from './server.js';
import { close, mask, open, paintOver, save, saved, say, settings, start } from './state.js';
import { altOf } from './work.js';

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const MOST_UNDONE = 20;

// A colour that stands out from most pictures; what is saved is white on black.
const PAINT = '#ff2d78';

/** Gives everything that is painted one colour. */
function tint(pen, colour) {
  pen.globalCompositeOperation = 'source-in';
  pen.fillStyle = colour;
  pen.fillRect(0, 0, pen.canvas.width, pen.canvas.height);
}

/** Paint on a transparent canvas, and its history. */
function usePaint(width, height) {
  const canvas = useRef();
  const history = useRef([]);
  const [painted, setPainted] = useState(0);
  const context = () => canvas.current.getContext('2d', { willReadFrequently: true });
  const look = () => {
    const { data } = context().getImageData(0, 0, width, height);
    let count = 0;
    for (let place = 3; place < data.length; place += 4) count += data[place] > 127;
    setPainted(count / (width * height));
  };
  const remember = () => {
    history.current = [...history.current, context().getImageData(0, 0, width, height)].slice(-MOST_UNDONE);
  };
  const stroke = (from, to, size, erase) => {
    const pen = context();
    pen.globalCompositeOperation = erase ? 'destination-out' : 'source-over';
    pen.strokeStyle = PAINT;
    pen.lineWidth = size;
    pen.lineCap = 'round';
    pen.beginPath();
    pen.moveTo(from.x, from.y);
    pen.lineTo(to.x + 0.01, to.y);
    pen.stroke();
  };
  const act = (change) => {
    remember();
    change(context());
    look();
  };
  return {
    canvas, painted, stroke, remember, look,
    rectangle: (x, y, w, h, erase) => act((pen) => {
      pen.globalCompositeOperation = erase ? 'destination-out' : 'source-over';
      pen.fillStyle = PAINT;
      pen.fillRect(x, y, w, h);
    }),
    clear: () => act((pen) => pen.clearRect(0, 0, width, height)),
    invert: () => act((pen) => {
      pen.globalCompositeOperation = 'xor';
      pen.fillStyle = PAINT;
      pen.fillRect(0, 0, width, height);
    }),
    undo: () => {
      const before = history.current.pop();
      if (before) context().putImageData(before, 0, 0);
      look();
    },
    load: (url) => {
      const image = new Image();
      image.onload = () => {
        const copy = document.createElement('canvas');
        Object.assign(copy, { width, height });
        const pen = copy.getContext('2d');
        pen.drawImage(image, 0, 0, width, height);
        const pixels = pen.getImageData(0, 0, width, height);
        for (let place = 0; place < pixels.data.length; place += 4) pixels.data[place + 3] = pixels.data[place];
        pen.putImageData(pixels, 0, 0);
        tint(pen, PAINT);
        context().drawImage(copy, 0, 0);
        look();
      };
      image.src = url;
    },
    // White where to repaint, black elsewhere.
    save: () => {
      const copy = document.createElement('canvas');
      Object.assign(copy, { width, height });
      const pen = copy.getContext('2d');
      pen.drawImage(canvas.current, 0, 0);
      tint(pen, '#fff');
      pen.globalCompositeOperation = 'destination-over';
      pen.fillStyle = '#000';
      pen.fillRect(0, 0, width, height);
      return copy.toDataURL('image/png');
    },
  };
}

function Rectangle({ width, height, onAdd }) {
  const [box, setBox] = useState([0, 0, Math.round(width / 2), Math.round(height / 2)]);
  const limits = [width - 1, height - 1, width, height];
  return html`<fieldset class="row">
    <legend>${t('rectangle')}</legend>
    ${['left', 'top', 'width', 'height'].map((name, place) => html`<label key=${name}>${t(name)}
      <${NumberInput} value=${box[place]} min=${0} max=${limits[place]} step=${1}
        onChange=${(value) => setBox(box.with(place, Math.round(value)))} /></label>`)}
    <button type="button" onClick=${() => onAdd(...box)}>${t('add')}</button>
  </fieldset>`;
}

export function MaskDialog() {
  const { url, width, height } = start.value;
  const paint = usePaint(width, height);
  const [size, setSize] = useState(Math.round(Math.max(width, height) / 8));
  const [edge, setEdge] = useState(mask.value?.edge ?? 4);
  const [erase, setErase] = useState(false);
  const [cursor, setCursor] = useState({ x: width / 2, y: height / 2 });
  const last = useRef(null);
  useEffect(() => mask.value && paint.load(mask.value.url), []);

  const at = (event) => {
    const box = event.currentTarget.getBoundingClientRect();
    const share = { x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height };
    return { x: share.x * width, y: share.y * height };
  };
  const down = (event) => {
    event.currentTarget.setPointerCapture(event.pointerId);
    paint.remember();
    last.current = at(event);
    paint.stroke(last.current, last.current, size, erase);
  };
  const move = (event) => {
    const point = at(event);
    setCursor(point);
    if (last.current) paint.stroke(last.current, point, size, erase);
    if (last.current) last.current = point;
  };
  const up = () => {
    last.current = null;
    paint.look();
  };
  const key = (event) => {
    const way = ARROWS[event.key];
    if (!way && event.key !== ' ') return;
    event.preventDefault();
    if (!way) {
      paint.remember();
      paint.stroke(cursor, cursor, size, erase);
      return paint.look();
    }
    const step = event.shiftKey ? 1 : Math.max(1, size / 2);
    setCursor({ x: Math.min(width, Math.max(0, cursor.x + way[0] * step)),
      y: Math.min(height, Math.max(0, cursor.y + way[1] * step)) });
  };
  const done = () => {
    paintOver(paint.painted > 0 ? { url: paint.save(), edge } : null);
    close();
  };

  const place = { '--x': `${(cursor.x / width) * 100}%`, '--y': `${(cursor.y / height) * 100}%`,
    '--size': `${(size / width) * 100}%`, aspectRatio: `${width} / ${height}`, '--ratio': width / height };
  return html`<${Dialog} title=${t('mask')} wide>
    <p class="hint" id="mask-hint">${t('mask_hint')}</p>
    <div class="paint" style=${place}>
      <img src=${url} alt="" />
      <canvas ref=${paint.canvas} width=${width} height=${height} tabindex="0" role="application"
        aria-label=${t('mask_canvas')} aria-describedby="mask-hint" onPointerDown=${down} onPointerMove=${move}
        onPointerUp=${up} onPointerCancel=${up} onKeyDown=${key}></canvas>
      <span class="brush" aria-hidden="true"></span>
    </div>
    <div class="row wrap">
      <${Slider} label=${t('brush_size')} value=${size} min=${1} max=${Math.round(Math.max(width, height) / 2)}
        step=${1} onChange=${setSize} />
      <${Slider} label=${t('soft_edge')} value=${edge} min=${0} max=${64} typed=${1024} step=${1} onChange=${setEdge} />
      <button type="button" aria-pressed=${erase} onClick=${() => setErase(!erase)}>${t('erase')}</button>
      <button type="button" onClick=${paint.undo}>${t('undo')}</button>
      <button type="button" onClick=${paint.invert}>${t('invert')}</button>
      <button type="button" onClick=${paint.clear}>${t('clear')}</button>
    </div>
    <${Rectangle} width=${width} height=${height} onAdd=${(...box) => paint.rectangle(...box, erase)} />
    <footer class="dialog-foot">
      <output>${t('mask_share', { share: number(paint.painted, { style: 'percent' }) })}</output>
      <button type="button" class="primary" onClick=${done}><${Icon} name="check" />${t('use_mask')}</button>
    </footer>
  </${Dialog}>`;
}

// The same settings with one or two of them varied: a table of images.

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
