// A room as one connection sees it. MeshClient makes these objects and feeds
// them. Names that begin with an underscore are only for these two classes.

// Room holds the members of one room and keeps them current with the server's
// updates.
//
// Events: "snapshot" (members were rebuilt), "join", "leave", "state",
// "metadata", "place" (detail: the member), "status" (status, joined, stale or bar changed).
export class Room extends EventTarget {
  members = new Map(); // connection id -> {id, userId, userConnections, metadata, state, disconnected}
  total = 0; // more than members.size if the server listed only some of them
  status = "down"; // "down", "entering", "live", "refused" or "ended"
  joined = false;
  stale = false; // Redis does not answer; these are the last known members
  bar = null; // why we are not in the room although we may see it: "full", "refused" or "removed"

  #client;
  #snapshots = 0; // number of snapshots: a check for an earlier one stops

  constructor(client, name) {
    super();
    this.#client = client;
    this.name = name;
  }

  // patch sets keys of this connection's state in the room, and removes those with null.
  // expireAfter, in ms, ends the given keys.
  patch(state, expireAfter) {
    return this.#client.command("mesh/publish-presence-state", { roomName: this.name, patch: true, state, expireAfter });
  }

  // leave ends it. The room gets no more updates.
  leave() {
    const ignore = () => {}; // a lost connection has left as well
    this.#client._forget(this);
    this.#client._request("mesh/unsubscribe-presence", { roomName: this.name }, ignore);
    this.#client._request("mesh/leave-room", { roomName: this.name }, ignore);
    this._down();
  }

  // doubt notes that the server cannot reach Redis, as the answer to another
  // command said. The room is stale until it can.
  doubt() {
    if (this.status !== "live" || this.stale) return;
    this.stale = true;
    this.#emit("status");
    this.#awaitFresh(++this.#snapshots);
  }

  _enter() {
    const payload = { roomName: this.name };
    const wanted = () => this.#client._has(this);
    this.#setStatus("entering");
    // A client that was removed does not come back by itself. If we had a connection
    // before, this one takes its place, whether or not the server has noticed its end.
    if (this.bar !== "removed") {
      const join = { ...payload, replaces: this.#client.lastID ?? undefined };
      this.#client._insist("mesh/join-room", join, wanted, (error, answer) => {
        this.joined = !error && answer?.success === true;
        this.bar = this.joined || error ? null : answer?.code === "EFULL" ? "full" : "refused";
        this.#emit("status");
      });
    }
    this.#client._insist("mesh/subscribe-presence", payload, wanted, (error, answer) => {
      if (error || answer?.success !== true) this.#setStatus("refused");
      else this.#rebuild(answer);
    });
  }

  // _down keeps the members, so that the page can go on showing them.
  _down() {
    this.joined = false;
    this.#setStatus("down");
  }

  _ended() {
    this.members.clear();
    this.total = 0;
    this.#setStatus("ended");
  }

  // _left notes that the server has taken us out of the room, or found it full when Redis
  // was back.
  _left(reason) {
    this.joined = false;
    this.bar = reason === "full" || reason === "refused" ? reason : "removed";
    this.#emit("status");
  }

  // _added notes that the app has brought us into the room.
  _added() {
    this.joined = true;
    this.bar = null;
    this.#emit("status");
  }

  // _update applies one update. Before the snapshot there is nothing to apply
  // it to, and the snapshot will contain it.
  _update({ type, connectionId: id, userId, userConnections, metadata, state }) {
    if (this.status !== "live") return;
    const member = this.members.get(id);
    if (type === "join") this.#join({ id, userId: userId ?? "", userConnections, metadata: metadata ?? null, state: null, disconnected: false });
    else if (type === "leave") this.#leave(member, userConnections);
    else if (member === undefined) return;
    else if (type === "state") {
      member.state = state ?? null;
      this.#emit("state", member);
    } else if (type === "metadata") {
      Object.assign(member, { metadata: metadata ?? null, userId: userId ?? member.userId });
      this.#emit("metadata", member);
    } else if (type === "disconnect" || type === "reconnect") {
      member.disconnected = type === "disconnect";
      this.#emit("place", member);
    }
  }

  #emit(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }

  #setStatus(status) {
    this.status = status;
    this.#emit("status");
  }

  #rebuild({ present, states = {}, total = 0, stale = false }) {
    this.members.clear();
    for (const { id, userId = "", metadata = null, disconnected = false } of present) {
      const state = Object.hasOwn(states, id) ? states[id] : null;
      this.members.set(id, { id, userId, metadata, state, disconnected });
    }
    this.total = Math.max(total, this.members.size);
    this.stale = stale === true;
    this.#setStatus("live");
    this.#emit("snapshot");
    if (this.stale) this.#awaitFresh(++this.#snapshots);
  }

  // awaitFresh asks until the server reaches Redis again. Changes arrive as
  // updates, so this only removes the stale mark.
  #awaitFresh(snapshot) {
    const payload = { roomName: this.name };
    const wanted = () => this.status === "live" && this.stale && snapshot === this.#snapshots;
    this.#client._insist("mesh/get-presence-state", payload, wanted, (error, answer) => {
      if (error || answer?.stale) {
        setTimeout(() => wanted() && this.#awaitFresh(snapshot), 2_000);
        return;
      }
      this.stale = false;
      this.#emit("status");
    });
  }

  #join(joined) {
    if (!this.members.has(joined.id)) this.total++;
    this.members.set(joined.id, joined);
    this.#emit("join", joined);
  }

  #leave(member, userConnections) {
    if (member === undefined) {
      // A member that the server did not list, or an unknown one.
      if (this.total > this.members.size) {
        this.total--;
        this.#emit("status");
      }
      return;
    }
    this.members.delete(member.id);
    this.total--;
    member.userConnections = userConnections;
    this.#emit("leave", member);
  }
}
