// How people look: names, colours, initials. Data from others is always treated
// as text, or checked to be a colour.

const NAME_LENGTH = 40;
const COLOR = /^#[0-9a-f]{6}$/i;

// White text is readable on each of them (WCAG: 4.5 to 1 or more).
export const PALETTE = [
  "#4f46e5", "#2563eb", "#0e7490", "#0f766e", "#15803d", "#4d7c0f",
  "#a16207", "#c2410c", "#b91c1c", "#be185d", "#a21caf", "#7c3aed",
];

const FIRST = ["Amber", "Brave", "Calm", "Dapper", "Eager", "Gentle", "Happy", "Jolly", "Lucky", "Mellow", "Quiet", "Sunny"];
const SECOND = ["Badger", "Falcon", "Fox", "Heron", "Ibex", "Lynx", "Marten", "Otter", "Panda", "Robin", "Tapir", "Wren"];

const pick = (list) => list[Math.floor(Math.random() * list.length)];

export const randomName = () => `${pick(FIRST)} ${pick(SECOND)}`;
export const isColor = (color) => typeof color === "string" && COLOR.test(color);

// cutName keeps whole characters, because the server counts code points.
export const cutName = (name) => [...name.trim()].slice(0, NAME_LENGTH).join("").trim();

// person reads a person from any value: members may have no metadata, or
// metadata that this page did not write. The page groups connections by key, which is
// the user as the server reports it, or otherwise the connection itself.
export function person(metadata, id, userId = "") {
  const text = (value) => (typeof value === "string" ? value : "");
  const key = userId === "" ? `connection ${id}` : `user ${userId}`;
  return {
    key,
    name: cutName(text(metadata?.name)) || `Guest ${id.slice(0, 4)}`,
    color: isColor(metadata?.color) ? metadata.color : colorOf(key),
  };
}

// colorOf returns the same colour for a user in every browser.
export function colorOf(key) {
  let hash = 0x811c9dc5; // FNV-1a
  for (const c of key) hash = Math.imul(hash ^ c.codePointAt(0), 0x01000193) >>> 0;
  return PALETTE[(hash >>> 8) % PALETTE.length];
}

export function initials(name) {
  const words = name.split(/[^\p{L}\p{N}\p{Emoji_Presentation}]+/u).filter(Boolean);
  if (words.length === 0) return "?";
  const picked = words.length > 1 ? [words[0], words.at(-1)] : words;
  return picked.map((word) => upper([...word][0])).join("");
}

// upper keeps characters whose upper case has two letters, such as ß.
const upper = (c) => (c.toUpperCase().length === c.length ? c.toUpperCase() : c);

// onColor returns black or white, whichever has more contrast (WCAG's
// luminance).
export function onColor(color) {
  const [r, g, b] = [1, 3, 5].map((i) => {
    const c = parseInt(color.slice(i, i + 2), 16) / 255;
    return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000000" : "#ffffff";
}
