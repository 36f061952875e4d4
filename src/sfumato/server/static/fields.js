// Templates instead of JSX: no build step, and nothing that a strict Content-Security-Policy forbids.
import htm from 'htm';
import { h } from 'preact';
import { useId, useLayoutEffect, useRef, useState } from 'preact/hooks';
import { t } from './i18n.js';
import { close } from './state.js';

export const html = htm.bind(h);

/** Class names from those that apply. */
export const names = (...list) => list.filter(Boolean).join(' ');

// Icons and labelled controls. Whatever can be dragged can also be typed.

// Lines on a grid of 24, drawn in the colour of the text.
const PATHS = {
  again: 'M4 12a8 8 0 1 0 3-6.2M4 4v5h5',
  arrows: 'M9 7l-5 5 5 5M15 7l5 5-5 5',
  brush: 'M14 4l6 6-8 8H6v-6zM4 21h16',
  check: 'M5 13l4 4L19 7',
  clock: 'M12 7v5l3 2M12 3a9 9 0 1 1 0 18a9 9 0 0 1 0-18z',
  close: 'M6 6l12 12M18 6L6 18',
  compare: 'M12 3v18M4 6h5v12H4zM15 6h5v12h-5z',
  copy: 'M9 9h11v11H9zM5 15H4V4h11v1',
  down: 'M12 4v11M7 11l5 5 5-5M5 20h14',
  grid: 'M4 4h7v7H4zM13 4h7v7h-7zM4 13h7v7H4zM13 13h7v7h-7z',
  help: 'M9 9a3 3 0 1 1 4.5 2.6c-1 .6-1.5 1.2-1.5 2.4M12 17.5v.5M12 3a9 9 0 1 1 0 18a9 9 0 0 1 0-18z',
  image: 'M4 5h16v14H4zM4 16l5-5 4 4 3-3 4 4M15 9h.01',
  info: 'M12 11v6M12 7.5v.5M12 3a9 9 0 1 1 0 18a9 9 0 0 1 0-18z',
  link: 'M10 14a4 4 0 0 0 6 0l3-3a4 4 0 0 0-6-6l-1 1M14 10a4 4 0 0 0-6 0l-3 3a4 4 0 0 0 6 6l1-1',
  next: 'M9 5l7 7-7 7',
  panel: 'M4 5h16v14H4zM15 5v14',
  pin: 'M9 4h6l-1 6 3 3H7l3-3zM12 13v7',
  previous: 'M15 5l-7 7 7 7',
  redo: 'M20 9h-9a5 5 0 0 0 0 10h4M16 5l4 4-4 4',
  settings: 'M4 7h10M18 7h2M4 17h2M10 17h10M16 5v4M8 15v4',
  sparkle: 'M12 3l2 7 7 2-7 2-2 7-2-7-7-2 7-2z',
  theme: 'M12 3a9 9 0 1 0 9 9a7 7 0 0 1-9-9z',
  trash: 'M4 7h16M9 7V4h6v3M6 7l1 13h10l1-13',
  undo: 'M4 9h9a5 5 0 0 1 0 10H9M8 5L4 9l4 4',
  warning: 'M12 4l9 16H3zM12 10v4M12 17v.5',
};

export const Icon = ({ name }) =>
  html`<svg class="icon" viewBox="0 0 24 24" aria-hidden="true"><path d=${PATHS[name]} /></svg>`;

/** A button that shows an icon and says its name to those who cannot see it, and to those who point at it. */
export const IconButton = ({ icon, label, pressed, class: extra, ...rest }) =>
  html`<button type="button" class=${names('icon-button', extra)} aria-label=${label} title=${label}
    aria-pressed=${pressed} ...${rest}><${Icon} name=${icon} /></button>`;

const limit = (value, min, max) => Math.min(max, Math.max(min, value));

/** A number to type; what is no number changes nothing, and what is too large or small becomes the nearest allowed. */
export function NumberInput({ value, min, max, step, onChange, empty, ...rest }) {
  // What is half typed is kept apart: news from the server that draws the page anew would put the old number back.
  const [draft, setDraft] = useState(null);
  const change = (event) => {
    const text = event.target.value.trim();
    setDraft(null);
    if (text === '' && empty) return onChange(null);
    const typed = text === '' ? NaN : Number(text);
    if (Number.isFinite(typed)) onChange(limit(typed, min, max));
  };
  return html`<input type="number" inputmode="decimal" value=${draft ?? value ?? ''} min=${min} max=${max}
    step=${step} onInput=${(event) => setDraft(event.target.value)} onChange=${change} onBlur=${() => setDraft(null)}
    ...${rest} />`;
}

/** A number with a slider below it. `own`: the value where none is set. */
export function Slider({ label, value, own, min, max, step, typed = max, onChange }) {
  const id = useId();
  const shown = value ?? own ?? min;
  return html`<div class="field">
    <div class="field-head">
      <label for=${id}>${label}</label>
      ${value != null && own != null && value !== own &&
      html`<${IconButton} icon="again" class="tiny" label=${t('reset_field', { name: label })}
        onClick=${() => onChange(null)} />`}
      <${NumberInput} id=${id} value=${shown} min=${min} max=${typed} step=${step} onChange=${onChange} />
    </div>
    <input type="range" aria-label=${label} min=${min} max=${max} step=${step} value=${shown}
      onInput=${(event) => onChange(Number(event.target.value))} />
  </div>`;
}

/** A choice among [value, text, named] rows; `named`: the text is a name that is the same in all languages. */
export function Choice({ label, value, options, onChange, hint }) {
  const id = useId();
  return html`<div class="field">
    <label for=${id}>${label}</label>
    <select id=${id} value=${value ?? ''} aria-describedby=${hint ? `${id}-hint` : undefined}
      onChange=${(event) => onChange(event.target.value || null)}>
      ${options.map(([key, text, named]) =>
        html`<option key=${key} value=${key ?? ''} translate=${named ? false : undefined}>${text}</option>`)}
    </select>
    ${hint && html`<p class="hint" id="${id}-hint" lang="en" dir="auto">${hint}</p>`}
  </div>`;
}

/** A text of one line. */
export function TextInput({ label, value, onInput, ...rest }) {
  const id = useId();
  return html`<div class="field">
    <label for=${id}>${label}</label>
    <input type="text" id=${id} value=${value} onInput=${(event) => onInput(event.target.value)} ...${rest} />
  </div>`;
}

export function Check({ label, checked, onChange }) {
  return html`<label class="check">
    <input type="checkbox" checked=${checked} onChange=${(event) => onChange(event.target.checked)} />${label}
  </label>`;
}

/** A part that opens and closes, and stays as it was left. */
export function Section({ title, open, onToggle, children }) {
  return html`<details class="section" open=${open} onToggle=${(event) => onToggle(event.target.open)}>
    <summary>${title}</summary>${open && html`<div class="stack">${children}</div>`}
  </details>`;
}

/** A modal dialog: the browser keeps the focus inside, closes it on Escape, and gives the focus back. */
export function Dialog({ title, wide, children, onClose = close, ...rest }) {
  const ref = useRef();
  // At once, not after the next frame: a key pressed meanwhile is meant for the dialog.
  useLayoutEffect(() => {
    const before = document.activeElement;
    ref.current.showModal();
    return () => before?.isConnected && before.focus();
  }, []);
  return html`<dialog ref=${ref} class=${names(wide && 'wide')} aria-label=${title} closedby="any"
    onClose=${onClose} ...${rest}>
    <header class="dialog-head"><h2>${title}</h2>
      <${IconButton} icon="close" label=${t('close')} onClick=${() => ref.current.close()} /></header>
    ${children}
  </dialog>`;
}
