// A small browser client for the presence part of the Mesh wire protocol. It
// has one WebSocket, commands with answers, and rooms that it joins again after
// every reconnect. It has no dependencies and needs no build step.

import { Room } from "./room.js";

const OPEN_TIMEOUT = 10_000; // for the socket to open and the id to arrive
const STABLE = 5_000; // a connection that lasted this long resets the backoff
const FIRST_WAIT = 500; // before the first reconnect, doubled each time
const LONGEST_WAIT = 10_000;
const TRY_AGAIN_LATER = 1013; // close code of an overloaded server
const MAX_ID = 99_999_999;

// Errors that are temporary, so that trying again makes sense.
const PASSING = new Set(["EUNAVAILABLE", "EBUSY", "ELIMIT", "ECONFLICT", "ETIMEOUT", "ECLOSED"]);

// jitter spreads the reconnects of clients that lost the same server: between
// half and all of ms.
const jitter = (ms) => ms * (0.5 + Math.random() / 2);

// An error from the server, or ECLOSED / ETIMEOUT of this client.
export class MeshError extends Error {
  constructor(message, code, name = "MeshError") {
    super(message);
    this.code = code;
    this.name = name;
  }

  get passing() {
    return PASSING.has(this.code);
  }
}

// MeshClient keeps one connection to url until it is closed.
//
// Events: "status" (detail: "connecting", "open", "waiting" or "closed"),
// "latency" (detail: ms), "metadata" (the server accepted ours), "trouble"
// (detail: a MeshError of a command that is tried again, or was given up).
export class MeshClient extends EventTarget {
  id = null; // of this connection; null without one
  lastID = null; // of the connection before it
  status = "closed";

  #url;
  #silence; // ms without any frame after which the connection counts as dead
  #answerTimeout;
  #WebSocket;
  #socket = null;
  #wanted = false;
  #attempts = 0;
  #openedAt = 0;
  #heardAt = 0;
  #retryTimer = 0;
  #watchdog = 0;
  #nextID = 0;
  #pending = new Map(); // request id -> {command, done, timer}
  #rooms = new Map(); // room name -> Room
  #metadata; // set again on every connection

  // pingInterval is the server's, in ms. The server pings at that interval, so
  // after two intervals of silence the server or the network must have failed.
  constructor(url, { pingInterval = 30_000, answerTimeout = 10_000, WebSocket = globalThis.WebSocket } = {}) {
    super();
    this.#url = url;
    this.#silence = 2 * pingInterval + 2_000;
    this.#answerTimeout = answerTimeout;
    this.#WebSocket = WebSocket;
  }

  // connect starts connecting and reconnecting. If the client waits for the
  // next attempt, connect tries at once.
  connect() {
    this.#wanted = true;
    if (this.#socket === null) this.#dial();
  }

  // close ends the connection and stays offline until connect.
  close() {
    this.#wanted = false;
    this.#drop();
  }

  // command sends a command. It resolves with the answer or rejects with a
  // MeshError.
  command(command, payload = {}) {
    return new Promise((resolve, reject) => {
      this._request(command, payload, (error, result) => (error ? reject(error) : resolve(result)));
    });
  }

  // setMetadata sets this connection's metadata now, and again at the start of
  // every later connection.
  setMetadata(metadata) {
    this.#metadata = metadata;
    if (this.id !== null) this.#sendMetadata();
  }

  // enter joins the room and subscribes to it, now and after each reconnect.
  enter(name) {
    let room = this.#rooms.get(name);
    if (room === undefined) {
      room = new Room(this, name);
      this.#rooms.set(name, room);
      if (this.id !== null) room._enter();
    }
    return room;
  }

  // _request calls done(error, result) exactly once, in the order in which
  // frames arrive. Frames after the answer have not been handled by then.
  _request(command, payload, done) {
    if (this.id === null) {
      done(new MeshError("not connected", "ECLOSED"));
      return;
    }
    const id = this.#takeID();
    const timer = setTimeout(() => {
      this.#pending.delete(id);
      done(new MeshError(`no answer to ${command}`, "ETIMEOUT"));
    }, this.#answerTimeout);
    this.#pending.set(id, { command, done, timer });
    this.#send({ id, command, payload });
  }

  // _insist repeats _request while the answer is a temporary error, the
  // connection is the same and wanted() is true. Then it calls done once.
  _insist(command, payload, wanted, done, wait = 1_000) {
    const socket = this.#socket;
    const current = () => socket === this.#socket && wanted();
    this._request(command, payload, (error, result) => {
      if (!current()) return;
      if (error) this.#emit("trouble", error);
      if (!error?.passing) {
        done(error, result);
        return;
      }
      setTimeout(() => {
        if (current()) this._insist(command, payload, wanted, done, Math.min(2 * wait, LONGEST_WAIT));
      }, jitter(wait));
    });
  }

  _has(room) {
    return this.#rooms.get(room.name) === room;
  }

  _forget(room) {
    if (this._has(room)) this.#rooms.delete(room.name);
  }

  #emit(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }

  #setStatus(status) {
    this.status = status;
    this.#emit("status", status);
  }

  #dial() {
    clearTimeout(this.#retryTimer);
    const socket = new this.#WebSocket(this.#url);
    this.#socket = socket;
    this.#heardAt = Date.now();
    // Listeners of an abandoned socket do nothing. Its close event may come
    // long after the next socket is open.
    socket.onmessage = (event) => {
      if (socket === this.#socket) this.#receive(event.data);
    };
    socket.onclose = (event) => {
      if (socket === this.#socket) this.#drop(event.code);
    };
    // Wall clock on purpose: after the machine slept, the first tick notices.
    this.#watchdog = setInterval(() => {
      const limit = this.id === null ? OPEN_TIMEOUT : this.#silence;
      if (Date.now() - this.#heardAt > limit) this.#drop();
    }, 1_000);
    this.#setStatus("connecting");
  }

  // drop abandons the current socket, if any, and plans the next.
  #drop(code) {
    const socket = this.#socket;
    const lasted = this.id === null ? 0 : Date.now() - this.#openedAt;
    this.#socket = null;
    this.lastID = this.id ?? this.lastID;
    this.id = null;
    clearInterval(this.#watchdog);
    clearTimeout(this.#retryTimer);
    socket?.close();
    for (const { done, timer } of this.#takePending()) {
      clearTimeout(timer);
      done(new MeshError("connection lost", "ECLOSED"));
    }
    for (const room of this.#rooms.values()) room._down();
    if (!this.#wanted) {
      this.#setStatus("closed");
      return;
    }
    if (lasted >= STABLE) this.#attempts = 0;
    if (code === TRY_AGAIN_LATER) this.#attempts = Math.max(this.#attempts, 3);
    const wait = Math.min(FIRST_WAIT * 2 ** this.#attempts++, LONGEST_WAIT);
    this.#retryTimer = setTimeout(() => this.#dial(), jitter(wait));
    this.#setStatus("waiting");
  }

  #takePending() {
    const pending = [...this.#pending.values()];
    this.#pending.clear();
    return pending;
  }

  #takeID() {
    do {
      this.#nextID = this.#nextID === MAX_ID ? 0 : this.#nextID + 1;
    } while (this.#pending.has(this.#nextID));
    return this.#nextID;
  }

  #send(frame) {
    this.#socket.send(JSON.stringify(frame));
  }

  #receive(data) {
    this.#heardAt = Date.now();
    let frame;
    try {
      frame = JSON.parse(data);
    } catch {
      return;
    }
    if (typeof frame?.command !== "string") return;
    if (frame.id !== undefined) this.#answer(frame);
    else this.#push(frame);
  }

  #answer({ id, command, payload }) {
    const request = this.#pending.get(id);
    if (request?.command !== command) return; // too late, or not ours
    this.#pending.delete(id);
    clearTimeout(request.timer);
    if (typeof payload?.error === "string" && typeof payload.code === "string") {
      request.done(new MeshError(payload.error, payload.code, payload.name));
    } else {
      request.done(null, payload);
    }
  }

  #push({ command, payload }) {
    switch (command) {
      case "mesh/assign-id":
        this.#assigned(payload);
        break;
      case "ping":
        this.#send({ id: this.#takeID(), command: "pong", payload: {} });
        break;
      case "latency:request":
        this.#send({ id: this.#takeID(), command: "latency:response", payload: payload ?? {} });
        break;
      case "latency":
        this.#emit("latency", payload);
        break;
      case "mesh/presence-update":
        this.#rooms.get(payload?.roomName)?._update(payload);
        break;
      case "mesh/room-left":
        this.#rooms.get(payload?.roomName)?._left(payload.reason);
        break;
      case "mesh/room-joined":
        this.#rooms.get(payload?.roomName)?._added();
        break;
      case "mesh/membership-ended":
        this.#rooms.get(payload?.roomName)?._left("refused");
        break;
      case "mesh/presence-stale":
        if (payload?.stale === true) for (const room of this.#rooms.values()) room.doubt();
        break;
      case "mesh/presence-ended":
        this.#rooms.get(payload?.roomName)?._ended();
        break;
    }
  }

  // assigned sends all commands that a new connection needs at once. The server
  // executes the commands of one connection in order, so the join always has
  // the metadata.
  #assigned(id) {
    this.id = id;
    this.#openedAt = Date.now();
    if (this.#metadata !== undefined) this.#sendMetadata();
    for (const room of this.#rooms.values()) room._enter();
    this.#setStatus("open");
  }

  #sendMetadata() {
    const metadata = this.#metadata;
    const wanted = () => metadata === this.#metadata;
    this._insist("mesh/set-my-connection-metadata", { metadata }, wanted, (error) => {
      if (!error) this.#emit("metadata");
    });
  }
}
