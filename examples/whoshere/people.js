// How people look: names, colours, initials, and the elements that show them.
// Whatever comes from others goes through textContent, or is checked to be a
// colour; nothing is ever parsed as HTML.

const NAME_LENGTH = 40;
const COLOR = /^#[0-9a-f]{6}$/i;
const PALETTE = [
  "#4f46e5", "#0369a1", "#0f766e", "#15803d", "#a16207", "#c2410c",
  "#be123c", "#a21caf", "#7c3aed", "#475569", "#f59e0b", "#22d3ee",
];
const FIRST = ["Amber", "Brave", "Calm", "Dapper", "Eager", "Gentle", "Happy", "Jolly", "Lucky", "Mellow", "Quiet", "Sunny"];
const SECOND = ["Badger", "Falcon", "Fox", "Heron", "Ibex", "Lynx", "Marten", "Otter", "Panda", "Robin", "Tapir", "Wren"];
const SVG = "http://www.w3.org/2000/svg";

const pick = (list) => list[Math.floor(Math.random() * list.length)];

// cutName keeps whole characters: the server counts them as code points.
export const cutName = (name) => [...name.trim()].slice(0, NAME_LENGTH).join("").trim();

export const randomPerson = () => ({ name: `${pick(FIRST)} ${pick(SECOND)}`, color: pick(PALETTE) });

// person reads a person from anything: members may have no metadata, or some
// that this page did not write.
export function person(metadata, id = "") {
  const name = typeof metadata?.name === "string" ? cutName(metadata.name) : "";
  const color = typeof metadata?.color === "string" && COLOR.test(metadata.color) ? metadata.color : "";
  return { name: name || `Guest ${id.slice(0, 4)}`, color: color || colorOf(id) };
}

function colorOf(id) {
  let sum = 0;
  for (const c of id) sum = (sum * 31 + c.codePointAt(0)) >>> 0;
  return PALETTE[sum % PALETTE.length];
}

export function initials(name) {
  const words = name.split(/\s+/).filter(Boolean);
  const picked = words.length > 1 ? [words[0], words.at(-1)] : words;
  return picked.map((word) => [...word][0].toUpperCase()).join("");
}

// onColor is black or white, whichever contrasts more (WCAG's luminance).
export function onColor(color) {
  const [r, g, b] = [1, 3, 5].map((i) => {
    const c = parseInt(color.slice(i, i + 2), 16) / 255;
    return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000000" : "#ffffff";
}

export function element(tag, className, text) {
  const el = document.createElement(tag);
  if (className) el.className = className;
  if (text !== undefined) el.textContent = text;
  return el;
}

function paint(el, color) {
  el.style.setProperty("--person", color);
  el.style.setProperty("--on-person", onColor(color));
}

// setText spares the browser, and screen readers, what has not changed.
export function setText(el, text) {
  if (el.textContent !== text) el.textContent = text;
}

// PersonRow is one person in the list.
export class PersonRow {
  el = element("li");
  #avatar = element("span", "avatar");
  #name = element("span", "name");
  #you = element("span", "tag", "you");
  #doing = element("span", "tag doing");

  constructor(id, isMe) {
    this.el.dataset.id = id;
    this.#avatar.setAttribute("aria-hidden", "true");
    this.el.append(this.#avatar, this.#name);
    if (isMe) this.el.append(this.#you);
    this.el.append(this.#doing);
  }

  show({ name, color }, typing) {
    setText(this.#name, name);
    setText(this.#avatar, initials(name));
    setText(this.#doing, typing ? "typing…" : "");
    this.#name.title = name;
    this.el.dataset.typing = String(typing);
    paint(this.el, color);
  }
}

// Cursor is another's pointer.
export class Cursor {
  el = element("div", "cursor");
  #label = element("span");
  #x = 0;
  #y = 0;

  constructor(id) {
    const arrow = document.createElementNS(SVG, "svg");
    const path = document.createElementNS(SVG, "path");
    arrow.setAttribute("viewBox", "0 0 18 22");
    path.setAttribute("d", "M1 1l5.2 18 3.4-7.4L17 9.2z");
    arrow.append(path);
    this.el.dataset.id = id;
    this.el.append(arrow, this.#label);
  }

  show({ name, color }) {
    setText(this.#label, name);
    paint(this.el, color);
  }

  move(x, y) {
    this.#x = x;
    this.#y = y;
    this.place();
  }

  // place is called again when the shared area changes its size.
  place() {
    const area = this.el.parentElement;
    if (area === null) return;
    const left = this.#x * area.clientWidth;
    const top = this.#y * area.clientHeight;
    this.el.style.transform = `translate(${left.toFixed(1)}px, ${top.toFixed(1)}px)`;
  }
}
