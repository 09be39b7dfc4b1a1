// The room on the screen: the people, who is typing, and the pointers.

import { Cursors } from "./cursors.js";
import { $, setText } from "./elements.js";
import { People } from "./people.js";
import { Users, isTyping } from "./users.js";

const REDRAW = 40; // changes are collected for this time, in ms

export class RoomView {
  #myID;
  #mine = ""; // key of our user; kept while offline, because the list stays
  #room = null;
  #users = new Users();
  #people = new People();
  #cursors = new Cursors();
  #timer = 0;

  // myID sets which of the members is this tab.
  constructor(myID) {
    this.#myID = myID;
  }

  // show changes to another room.
  show(room) {
    this.#room = room;
    setText($("room-title"), room.name);
    this.reset();
  }

  // reset starts again from the room's members. After a snapshot every
  // connection may be another one.
  reset() {
    this.#users.clear();
    this.#cursors.clear();
    for (const member of this.#room.members.values()) this.#users.put(member);
    if (this.#room.status === "live") {
      for (const member of this.#room.members.values()) this.#point(member);
    }
    this.redraw();
  }

  clearCursors() {
    this.#cursors.clear();
  }

  // joined, changed and left handle one member. joined and left return the user
  // if it has just come or gone, as the server counts. They return nothing for another
  // tab of the same user, for one who reloads, and for our own user.
  joined(member) {
    const { user, first } = this.changed(member);
    const came = member.userId === "" ? first : member.userConnections === 1;
    return came && user.key !== this.#mine ? user : null;
  }

  changed(member) {
    const put = this.#users.put(member);
    if (member.id === this.#myID()) this.#mine = put.user.key;
    for (const each of put.user.members.values()) this.#point(each);
    this.redraw();
    return put;
  }

  left(member) {
    const { user, last } = this.#users.remove(member.id);
    this.#cursors.remove(member.id);
    this.redraw();
    const gone = member.userId === "" ? last : member.userConnections === 0;
    return gone && user.key !== this.#mine ? user : null;
  }

  // redraw draws the list after a moment. It uses a timer, because animation
  // frames stop in a hidden tab.
  redraw() {
    if (this.#timer !== 0) return;
    this.#timer = setTimeout(() => {
      this.#timer = 0;
      this.#draw();
    }, REDRAW);
  }

  #point(member) {
    if (member.id === this.#myID()) return;
    if (member.disconnected) {
      this.#cursors.remove(member.id);
      return;
    }
    const user = this.#users.of(member.id);
    this.#cursors.show(member, user, isTyping(user));
  }

  #draw() {
    const live = this.#room.status === "live";
    this.#mine = this.#users.of(this.#myID())?.key ?? this.#mine;
    const users = this.#users.list(this.#mine);
    document.body.dataset.live = String(live);
    const shown = this.#people.show(users, this.#mine, live);
    this.#count(users.length, shown, live);
    this.#tellTyping(live ? users.filter((user) => user.key !== this.#mine && isTyping(user)) : []);
  }

  // count counts users. If the server listed only some members of a large room,
  // the rest counts as connections without a name.
  #count(users, shown, live) {
    const more = users - shown + this.#room.total - this.#room.members.size;
    setText($("count"), String(users + this.#room.total - this.#room.members.size));
    setText($("more"), `and ${more} more`);
    $("more").hidden = more <= 0;
    const tabs = this.#room.members.size;
    setText($("summary"), live ? summary(users, tabs) : users > 0 ? "This is who was here when the connection was lost." : "");
    $("alone").hidden = !live || users > 1;
    document.title = `(${users}) ${this.#room.name} – Who’s here`;
  }

  #tellTyping(users) {
    $("typing").dataset.count = String(users.length);
    setText($("typing-text"), typingText(users.map((user) => user.name)));
  }
}

function summary(users, tabs) {
  if (users <= 1) return tabs > 1 ? `Just you, in ${tabs} tabs` : "Just you";
  return tabs > users ? `${users} people in ${tabs} tabs` : `${users} people`;
}

function typingText(names) {
  if (names.length === 0) return "";
  if (names.length === 1) return `${names[0]} is typing`;
  if (names.length <= 3) return `${names.slice(0, -1).join(", ")} and ${names.at(-1)} are typing`;
  return `${names.length} people are typing`;
}
