// Painting what a picture's mask repaints: with a pointer, with the keyboard, or as a rectangle in numbers.
import { useEffect, useRef, useState } from 'preact/hooks';
import { Dialog } from './dialogs.js';
import { Icon, NumberInput, Slider } from './fields.js';
import { html } from './html.js';
import { number, t } from './i18n.js';
import { close } from './screen.js';
import { mask, paintOver, start } from './settings.js';

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
