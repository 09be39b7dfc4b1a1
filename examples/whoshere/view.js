// The room on the screen: the list of people, who is typing, the cursors.

import { Cursor, PersonRow, person, setText } from "./people.js";

const LISTED = 200; // rows; the rest is counted
const CURSORS = 100;
const REDRAW = 40; // ms that changes are gathered for

const $ = (id) => document.getElementById(id);
const compare = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" }).compare;
const isTyping = (member) => member.state?.typing === true;
const inside = (n) => Number.isFinite(n) && n >= 0 && n <= 1;

export class RoomView {
  #myID;
  #room = null;
  #rows = new Map(); // connection id -> PersonRow
  #cursors = new Map(); // connection id -> Cursor
  #timer = 0;
  #resize = new ResizeObserver(() => this.#cursors.forEach((cursor) => cursor.place()));

  // myID tells which of the members is this page.
  constructor(myID) {
    this.#myID = myID;
    this.#resize.observe($("cursors"));
  }

  // show turns to another room, or starts the same one anew.
  show(room) {
    this.#room = room;
    this.reset();
  }

  // reset draws everything again: after a snapshot every connection may be
  // another one.
  reset() {
    this.#rows.clear();
    this.clearCursors();
    if (this.#room?.status === "live") {
      for (const member of this.#room.members.values()) this.moved(member);
    }
    this.redraw();
  }

  clearCursors() {
    this.#cursors.clear();
    $("cursors").replaceChildren();
  }

  // changed is a member that came, or has another name or state.
  changed(member) {
    this.#cursors.get(member.id)?.show(person(member.metadata, member.id));
    this.moved(member);
    this.redraw();
  }

  gone(member) {
    this.#rows.delete(member.id);
    this.#removeCursor(member.id);
    this.redraw();
  }

  // moved puts a member's cursor where its state says, at once: cursors move
  // more often than anything else here.
  moved(member) {
    if (member.id === this.#myID()) return;
    const { x, y } = member.state ?? {};
    if (!inside(x) || !inside(y)) {
      this.#removeCursor(member.id);
      return;
    }
    let cursor = this.#cursors.get(member.id);
    if (cursor === undefined) {
      if (this.#cursors.size >= CURSORS) return;
      cursor = new Cursor(member.id);
      cursor.show(person(member.metadata, member.id));
      this.#cursors.set(member.id, cursor);
      $("cursors").append(cursor.el);
    }
    cursor.move(x, y);
  }

  // redraw draws the list a moment later. A timer, not an animation frame:
  // those stand still in a hidden tab.
  redraw() {
    if (this.#timer !== 0) return;
    this.#timer = setTimeout(() => {
      this.#timer = 0;
      this.#draw();
    }, REDRAW);
  }

  #removeCursor(id) {
    this.#cursors.get(id)?.el.remove();
    this.#cursors.delete(id);
  }

  #draw() {
    const room = this.#room;
    const live = room.status === "live";
    document.body.dataset.live = String(live);
    const people = this.#sorted(room);
    const shown = people.slice(0, LISTED);
    this.#arrange(shown.map(({ member, who }) => this.#row(member, who, live)));
    this.#countUp(room, shown.length);
    const typing = live ? people.filter(({ member, mine }) => !mine && isTyping(member)) : [];
    setText($("typing"), typingText(typing.map(({ who }) => who.name)));
  }

  // sorted has this page first, then the others by name.
  #sorted(room) {
    const list = [...room.members.values()].map((member) => ({
      member,
      who: person(member.metadata, member.id),
      mine: member.id === this.#myID(),
    }));
    return list.sort((a, b) => b.mine - a.mine || compare(a.who.name, b.who.name) || compare(a.member.id, b.member.id));
  }

  #row(member, who, live) {
    let row = this.#rows.get(member.id);
    if (row === undefined) {
      row = new PersonRow(member.id, member.id === this.#myID());
      this.#rows.set(member.id, row);
    }
    row.show(who, live && isTyping(member));
    return row.el;
  }

  // arrange touches only what is out of place.
  #arrange(rows) {
    const list = $("people");
    rows.forEach((row, i) => {
      if (list.children[i] !== row) list.insertBefore(row, list.children[i] ?? null);
    });
    while (list.children.length > rows.length) list.lastElementChild.remove();
  }

  #countUp(room, shown) {
    const more = room.total - shown;
    setText($("count"), String(room.total));
    setText($("more"), `and ${more} more`);
    $("more").hidden = more <= 0;
    document.title = `(${room.total}) ${room.name} – Who’s here`;
  }
}

function typingText(names) {
  if (names.length === 0) return "";
  if (names.length === 1) return `${names[0]} is typing…`;
  if (names.length <= 3) return `${names.slice(0, -1).join(", ")} and ${names.at(-1)} are typing…`;
  return `${names.length} people are typing…`;
}
