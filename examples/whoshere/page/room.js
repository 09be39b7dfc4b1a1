// A room as one connection sees it. MeshClient makes these objects and feeds
// them. Names that begin with an underscore are only for these two classes.

// Room holds the members of one room and keeps them current with the server's
// updates.
//
// Events: "snapshot" (members were rebuilt), "join", "leave", "state",
// "metadata" (detail: the member), "status" (status, joined or stale changed).
export class Room extends EventTarget {
  members = new Map(); // connection id -> {id, metadata, state}
  total = 0; // more than members.size if the server listed only some of them
  status = "down"; // "down", "entering", "live", "refused" or "ended"
  joined = false;
  stale = false; // Redis does not answer; these are the last known members

  #client;
  #snapshots = 0; // number of snapshots: a check for an earlier one stops

  constructor(client, name) {
    super();
    this.#client = client;
    this.name = name;
  }

  // publish replaces this connection's state in the room. expireAfter is in ms.
  publish(state, expireAfter) {
    return this.#client.command("mesh/publish-presence-state", { roomName: this.name, state, expireAfter });
  }

  clear() {
    return this.#client.command("mesh/clear-presence-state", { roomName: this.name });
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

  // refresh asks for a member's metadata. Updates carry metadata only in joins.
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

  #join(id, member, metadata) {
    if (member !== undefined) {
      // This adds nothing to the list, but a repair may bring changes.
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
    if (metadata === undefined) this.refresh(id).catch(() => {}); // nameless until the answer comes
  }

  #leave(id, member) {
    if (member === undefined) {
      // A member that the server did not list, or an unknown one.
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
