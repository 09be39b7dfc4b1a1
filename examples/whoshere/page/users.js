// Presence is per connection, but people think in users. Users groups the
// connections of one user.

import { person } from "./person.js";

const compare = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" }).compare;

// Users holds the users in a room. A user is {key, name, color, members}.
// members are the room's members by connection id, one for each tab.
export class Users {
  #byKey = new Map();
  #known = new Map(); // connection id -> {key, metadata}

  get size() {
    return this.#byKey.size;
  }

  clear() {
    this.#byKey.clear();
    this.#known.clear();
  }

  // of returns the user that a connection belongs to.
  of(id) {
    return this.#byKey.get(this.#known.get(id)?.key);
  }

  // put adds a member, or notes its new metadata. Of several tabs, the last
  // change of the metadata counts. put returns the user, and whether this is
  // its first connection.
  put(member) {
    const { id, metadata, userId } = member;
    const known = this.#known.get(id);
    const { key, name, color } = person(metadata, id, userId);
    if (known !== undefined && known.key === key && known.metadata === metadata) {
      this.of(id).members.set(id, member);
      return { user: this.of(id), first: false };
    }
    if (known !== undefined && known.key !== key) this.remove(id);
    let user = this.#byKey.get(key);
    const first = user === undefined;
    if (first) {
      user = { key, members: new Map() };
      this.#byKey.set(key, user);
    }
    Object.assign(user, { name, color });
    user.members.set(id, member);
    this.#known.set(id, { key, metadata });
    return { user, first };
  }

  // remove removes a connection. It returns its user, and whether that was the
  // last connection.
  remove(id) {
    const user = this.of(id);
    this.#known.delete(id);
    user?.members.delete(id);
    const last = user?.members.size === 0;
    if (last) this.#byKey.delete(user.key);
    return { user, last };
  }

  // list returns the own user first, then the others by name.
  list(mine) {
    const isMine = (user) => user.key === mine;
    return [...this.#byKey.values()].sort(
      (a, b) => isMine(b) - isMine(a) || compare(a.name, b.name) || compare(a.key, b.key),
    );
  }
}

// isAway reports whether a user has no connection now and the room keeps the place.
export function isAway(user) {
  return [...user.members.values()].every((member) => member.disconnected);
}

// isTyping reports whether any tab of a user is typing.
export function isTyping(user) {
  for (const member of user.members.values()) {
    if (member.state?.typing === true) return true;
  }
  return false;
}
