// Templates instead of JSX: no build step, and nothing that a strict Content-Security-Policy forbids.
import { h } from 'preact';
import htm from 'htm';

export const html = htm.bind(h);

/** Class names from those that apply. */
export const names = (...list) => list.filter(Boolean).join(' ');
