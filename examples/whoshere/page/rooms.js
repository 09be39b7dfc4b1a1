// Which room: the address names it, and the switcher changes the address
// without loading the page again.

import { $, element } from "./elements.js";

const OFFERED = ["lobby", "design", "standup"];
const VISITED = 4; // other rooms that stay in the switcher

// query is the part of the address that this page understands.
const query = () => new URLSearchParams(location.search);

// asWhom is the user of this tab: see Me.
export const asWhom = () => query().get("as")?.slice(0, 32) ?? "";

// roomFromURL reads #name, else ?room=name.
export function roomFromURL() {
  let name = location.hash.slice(1);
  try {
    name = decodeURIComponent(name);
  } catch {
    // A lone percent sign: use the text as it is.
  }
  return name.trim() || query().get("room")?.trim() || OFFERED[0];
}

function linkTo(room, as) {
  const params = new URLSearchParams({ room });
  if (as !== "") params.set("as", as);
  return `${location.pathname}?${params}`;
}

// Switcher shows the rooms to choose from.
//
// Event: "change" (the address may name another room).
export class Switcher extends EventTarget {
  #visited = []; // latest first, without the rooms that are always offered

  constructor() {
    super();
    $("rooms").addEventListener("click", (event) => {
      const link = event.target.closest("a");
      const inNewTab = event.metaKey || event.ctrlKey || event.shiftKey || event.altKey;
      if (link === null || inNewTab) return;
      event.preventDefault();
      this.#go(link.dataset.room);
    });
    $("room-form").addEventListener("submit", (event) => {
      event.preventDefault();
      const name = $("room-name").value.trim();
      $("room-name").value = "";
      if (name !== "") this.#go(name);
    });
    addEventListener("popstate", () => this.#changed()); // and when the hash changes
  }

  // show marks the current room.
  show(current) {
    if (!OFFERED.includes(current) && !this.#visited.includes(current)) {
      this.#visited = [current, ...this.#visited].slice(0, VISITED);
    }
    const links = [...OFFERED, ...this.#visited].map((room) => {
      const link = element("a", "", room);
      link.href = linkTo(room, asWhom());
      link.dataset.room = room;
      if (room === current) link.setAttribute("aria-current", "page");
      return link;
    });
    const focused = $("rooms").contains(document.activeElement);
    $("rooms").replaceChildren(...links.map((link) => element("li", "", link)));
    const here = links.find((link) => link.dataset.room === current);
    here.scrollIntoView({ block: "nearest", inline: "nearest" });
    if (focused) here.focus();
    const another = Math.random().toString(36).slice(2, 8);
    for (const link of document.querySelectorAll(".as-another")) link.href = linkTo(current, another);
  }

  #go(room) {
    history.pushState(null, "", linkTo(room, asWhom()));
    this.#changed();
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }
}
