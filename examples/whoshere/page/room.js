// A room as one connection sees it. MeshClient makes these and feeds them; what
// begins with an underscore is for the two of them only.

// Room is who is in one room, kept current by the server's updates.
//
// Events: "snapshot" (members were rebuilt), "join", "leave", "state",
// "metadata" (detail: the member), "status" (status, joined or stale changed).
export class Room extends EventTarget {
  members = new Map(); // connection id -> {id, metadata, state}
  total = 0; // more than members.size where the server gave a bounded list
  status = "down"; // "down", "entering", "live", "refused" or "ended"
  joined = false;
  stale = false; // Redis is away; the server listed what it last knew

  #client;
  #snapshots = 0; // how many there were: a check of an earlier one stops

  constructor(client, name) {
    super();
    this.#client = client;
    this.name = name;
  }

  // publish replaces this connection's state in the room; expireAfter in ms.
  publish(state, expireAfter) {
    return this.#client.command("mesh/publish-presence-state", { roomName: this.name, state, expireAfter });
  }

  clear() {
    return this.#client.command("mesh/clear-presence-state", { roomName: this.name });
  }

  // leave ends it: the room gets no more updates.
  leave() {
    const ignore = () => {}; // a lost connection has left as well
    this.#client._forget(this);
    this.#client._request("mesh/unsubscribe-presence", { roomName: this.name }, ignore);
    this.#client._request("mesh/leave-room", { roomName: this.name }, ignore);
    this._down();
  }

  // doubt takes note that the server cannot reach Redis, as it said of
  // something else: the room is stale until it can.
  doubt() {
    if (this.status !== "live" || this.stale) return;
    this.stale = true;
    this.#emit("status");
    this.#awaitFresh(++this.#snapshots);
  }

  // refresh asks for a member's metadata: updates carry it only on joins.
  async refresh(id) {
    const metadata = await this.#client.getMetadata(id);
    const member = this.members.get(id);
    if (member === undefined) return;
    member.metadata = metadata;
    this.#emit("metadata", member);
  }

  _enter() {
    const payload = { roomName: this.name };
    const wanted = () => this.#client._has(this);
    this.#setStatus("entering");
    this.#client._insist("mesh/join-room", payload, wanted, (error, answer) => {
      this.joined = !error && answer?.success === true;
      this.#emit("status");
    });
    this.#client._insist("mesh/subscribe-presence", payload, wanted, (error, answer) => {
      if (error || answer?.success !== true) this.#setStatus("refused");
      else this.#rebuild(answer);
    });
  }

  // _down forgets nobody: the page may go on showing who was here.
  _down() {
    this.joined = false;
    this.#setStatus("down");
  }

  _ended() {
    this.members.clear();
    this.total = 0;
    this.#setStatus("ended");
  }

  // _update applies one update. Before the snapshot there is nothing to apply
  // it to, and the snapshot will contain it.
  _update({ type, connectionId: id, metadata, state }) {
    if (this.status !== "live") return;
    const member = this.members.get(id);
    if (type === "join") this.#join(id, member, metadata);
    else if (type === "leave") this.#leave(id, member);
    else if (type === "state" && member !== undefined) {
      member.state = state ?? null;
      this.#emit("state", member);
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
    for (const { id, metadata = null } of present) {
      const state = Object.hasOwn(states, id) ? states[id] : null;
      this.members.set(id, { id, metadata, state });
    }
    this.total = Math.max(total, this.members.size);
    this.stale = stale === true;
    this.#setStatus("live");
    this.#emit("snapshot");
    if (this.stale) this.#awaitFresh(++this.#snapshots);
  }

  // awaitFresh asks until the server has Redis again. What changed meanwhile
  // arrives as updates, so only the mark is taken off here.
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

  #join(id, member, metadata) {
    if (member !== undefined) {
      // Nothing new to the list, but a repair may bring what changed.
      if (metadata !== undefined) {
        member.metadata = metadata;
        this.#emit("metadata", member);
      }
      return;
    }
    const joined = { id, metadata: metadata ?? null, state: null };
    this.members.set(id, joined);
    this.total++;
    this.#emit("join", joined);
    if (metadata === undefined) this.refresh(id).catch(() => {}); // nameless until it says more
  }

  #leave(id, member) {
    if (member === undefined) {
      // One of those that a bounded list left out, or nobody at all.
      if (this.total > this.members.size) {
        this.total--;
        this.#emit("status");
      }
      return;
    }
    this.members.delete(id);
    this.total--;
    this.#emit("leave", member);
  }
}
