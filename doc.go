// Package mesh adds real-time presence to WebSocket servers. It shows which
// connections are in a room, as they join and leave, across any number of servers
// that share one Redis.
//
// An app creates a [Server], declares with [Server.TrackPresence] which rooms have
// presence, starts the server and mounts it as an http.Handler. Clients speak the
// Mesh wire protocol. The JavaScript client of the TypeScript server works
// unmodified. An app that upgrades WebSockets itself hands them to
// [Server.ServeConn]. An app with a transport of its own uses a [PresenceManager]
// alone.
//
// # Terms
//
// A server is one running instance of this package, in one process, with a lease in
// Redis. Its group is all servers that share one Redis, one database and one prefix.
//
// A connection is one client of one server, with an id that is unique in the group:
// a WebSocket, or a connection of the app's own transport. Members are
// connections, so a user with two open tabs has two members.
//
// A room is a name that connections join and subscribe to. A room is tracked if a
// rule of [Server.TrackPresence] matches it. Tracked rooms have presence events and
// states. Other rooms only have members. Joining a room does not subscribe to it, and
// subscribing does not join it.
//
// An entry is the membership of one connection in one room. Each join makes a new
// entry. A member is a connection as seen from a room: its id, metadata and state.
//
// A state is JSON that a member publishes in a room, such as "typing" or a cursor. It
// ends with its entry or after a given time. Metadata is JSON of a connection or a
// room, such as a user id and a name. It has a version and is kept in Redis.
//
// A subscription yields one snapshot of a room and then every later update in order.
// The connection that it belongs to is its viewer. A guard is a callback of the app
// that decides whether a viewer may see a room. A join guard decides whether a
// connection may be in a room.
//
// A frame, a pong or [PresenceManager.Touch] is a sign of life of a connection.
// Silence is the time since the last one. The TTL of a room is the silence after which
// an entry ends.
//
// A user is the person or account that connections belong to, if Options.UserID names
// one. A user arrives in a room with the first connection and leaves with the last one.
// Grace is the time for which a room keeps the place of a user whose last connection
// ended without asking to leave. The member is disconnected until the user is back or
// Grace is over. A cap bounds the connections or the users of a room.
//
// docs/glossary.md defines all terms.
//
// # Levels
//
// The level of a client's connection decides how failed commands are answered. At
// level 1, the default, a failed command to publish or clear a state or to unsubscribe
// is answered with false, as by the TypeScript server. At level 2 it is answered with
// an error object that has a code. A client asks for level 2 with ?mesh-level=2 in the
// socket's URL, and an app with ConnOptions.Level. docs/wire-protocol.md lists the
// codes. [Stats] counts these failures at both levels.
//
// The level also decides which types of updates a client gets. At level 1 these are
// join, leave and state, which the stock client knows. At level 2 metadata, disconnect
// and reconnect come, too. Subscriptions of the app get all types.
//
// The answer to a subscribe request is sent in a write of its own, and updates of its
// room follow at least five milliseconds later. Otherwise the stock client under Node
// drops updates that arrive together with the answer.
//
// # Promises
//
//  1. Bounded leave. A connection that falls silent on a living server leaves TTL
//     after its last frame, within one second. If a server dies, its entries end at
//     most LeaseTTL + 1 s after it last renewed its lease. They end sooner if their
//     TTL is shorter and Redis's expired event arrives. All subscribers on all
//     servers see the leave. This holds with keyspace notifications on, off,
//     forbidden, late or lost. While Redis is unavailable, no leave can be
//     delivered. The bounds then count from its return plus one LeaseTTL. Clients
//     can still join and subscribe: they get the last known members, and the
//     difference when Redis is back.
//  2. Exactly one leave per departure and subscriber, regardless of how many servers
//     watch the room. The same holds for the end of a state. After a failover that
//     lost acknowledged writes, subscribers converge by repair.
//  3. No subscriber stays stale. A subscriber gets a snapshot and then every later
//     change in order. A server that missed a change detects it and repairs its
//     subscribers with exactly the difference.
//  4. Self-healing. If Redis loses data, the servers rebuild it within one heartbeat
//     (LeaseTTL/3), and subscribers see no leave of a connection that stayed. A
//     single lost key is found at the next heartbeat and restored. A server with
//     very many rooms and connections may take one heartbeat longer.
//  5. No resurrection. Nothing late (a refresh, a join that was delayed in a proxy, a
//     state, a server that resumed) brings back an entry that has ended.
//  6. Guards hold on every path. A connection that a guard refuses learns nothing
//     about the room. A guard that errors, panics or takes too long refuses. If too
//     many calls of one rule's guards hang, its guards are not called. Connections
//     that were allowed before stay allowed until the guards can be called again.
//     Other connections are refused.
//  7. No connection stalls another. A slow socket, guard, hook or Redis call delays
//     only its own connection. Queues are bounded. The behaviour at each bound is
//     documented, counted and logged.
//
// The promises hold on a Redis that evicts nothing (maxmemory-policy noeviction). If
// Redis evicts keys of members, they come back within two heartbeats, without leaves
// of connections that stayed. Until then reads lack those members. Evicted metadata of
// rooms is lost, because no server holds a copy. Start logs a warning.
//
// Redis processes are told apart by their run_id. A Redis-compatible server without
// run_id in its INFO (Dragonfly, Kvrocks) is identified by process id, port,
// replication id and uptime. If INFO has none of these, Start logs a warning: expired
// events may not arrive after a failover, and promise 1 then rests on leases alone.
//
// # How it works
//
// A room is one hash in Redis that maps connection ids to records. Each change is one
// call of a Lua script that changes the record and publishes the event, so that data
// and events cannot differ. Changes that wait at the same time share a call. A server
// keeps a mirror of each room that one of its subscribers watches. It applies events
// in the order of their numbers, and reads the room again if a number is missing. Each
// server holds a lease. If a lease runs out, another server ends the entries of that
// server, which it finds through an index. Expired events of keys with a TTL make
// leaves faster, but correctness does not depend on them. docs/design.md has the
// details.
//
// # Stopping
//
// [http.Server.Shutdown] does not wait for WebSockets. Call [Server.Shutdown] first,
// then Shutdown of the http.Server, then close the Redis client. Before that,
// [Server.Drain] can move clients to the other servers, spread over time. From the
// start of the drain [Server.Ready] fails, so that a load balancer stops sending
// clients to this server.
package mesh
