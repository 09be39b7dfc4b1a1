// Package meshtest tests programs that use mesh. It runs a Redis, your server and clients
// of the wire protocol inside the test's process. It opens no port and needs nothing
// installed. In a [testing/synctest] bubble a minute takes some hundredths of a second.
//
//	func TestGuard(t *testing.T) {
//		synctest.Test(t, func(t *testing.T) {
//			redis := meshtest.StartRedis(t)
//			srv, err := newChat(redis.Client()) // your rules, commands, hooks: a *mesh.Server
//			if err != nil {
//				t.Fatal(err)
//			}
//			server := meshtest.StartServer(t, srv)
//			ann, eve := server.Connect(t), server.Connect(t)
//
//			ann.Join("staff")
//			if eve.Subscribe("staff").Success {
//				t.Fatal("Eve sees the staff")
//			}
//			if _, err := eve.Call("chat/say", ""); meshtest.CodeOf(err) != "EINVALID" {
//				t.Fatal(err)
//			}
//			ann.Leave("staff")
//			eve.NoUpdate(30 * time.Second)
//		})
//	}
//
// To test the whole program, give [StartServer] your own handler with its routes and
// middleware, and the mesh server in it: StartServer(t, mux, srv). For several servers on
// one Redis, call StartServer once for each, with a client of its own from
// [Redis.Client].
//
// If the server runs elsewhere, as another process or on a port of
// [net/http/httptest.Server], [Connect] connects a client to its URL.
//
// A [Client] has a method for each command of the protocol, and [Client.Call] for the
// commands of your app. [Client.NextUpdate], [Client.ExpectUpdate] and
// [Client.AwaitUpdate] wait for an update, [Client.NextPush] waits for a push of your
// app, and [Client.NoUpdate] checks that no update comes. [WithFrames] shows every frame.
// A failure that a test may expect is returned as an error: [Server.Dial] and [Dial]
// return a [*HandshakeError], Call returns a [*CommandError]. All other failures fail the
// test. The file usage_test.go has whole tests of an app.
//
// # When calls return
//
// A call returns when its effect has happened on this server and in Redis, so that the
// next line of the test may rely on it. Other clients see the effect later. Wait for that
// with [Client.ExpectUpdate] or a similar method.
//
//   - [Server.Connect], [Server.Dial], [Connect], [Dial]: the OnConnection functions have
//     returned, except with [WithEarlyReturn].
//   - [Client.Join], [Client.Leave], [Client.PublishState], [Client.ClearState],
//
// [Client.SetMetadata]: Redis has the change, or a newer one. After a change of metadata
// the guards are asked again a little later.
//   - [Client.Subscribe], [Client.Unsubscribe] and the methods that read: the answer has
//     come.
//   - [Client.Call]: the handler has returned.
//   - [Client.Write], [Client.Silence] and [Client.Resume] do not wait for the server.
//     After a Write, a Call or NextMessage shows that the server has read it.
//   - [Client.Close], [Client.Kill], [Client.AwaitClose], and receiving from
//     [Client.Done]: the client's end is closed. The leaves and the OnDisconnection
//     functions follow, see Close.
//   - [Server.Kill]: the connections are cut. Other servers notice when its lease has run
//     out.
//   - [Server.Drain]: the connections of all clients have ended.
//   - [Server.Close]: everything has returned, OnDisconnection functions included.
//
// A test of a mesh.PresenceManager alone needs only [StartRedis]. [NewRedis], [NewServer]
// and [Server.Dial] do the same without a test, for an Example, or to try mesh without
// installing anything.
//
// # Time
//
// Inside [testing/synctest.Test], start everything in the bubble. The Redis, the servers
// and the clients then use its time. Let it pass with time.Sleep, or wait for an update
// or an answer: TTLs run out, pings are sent, leases are renewed and lost. A client waits
// for [DefaultTimeout], 30 s of that time. To see the end of a longer TTL, sleep first or
// connect [WithTimeout]. [testing/synctest.Wait] is rarely needed, because all methods
// that return received data wait for it. Outside a bubble the same test runs in real
// time. Use limits there that a slow machine keeps, and connect with [WithTimeout].
//
// [Redis.Advance] moves the clock of the Redis alone, as if the clock of its machine were
// set.
//
// # Faults
//
// Faults of a client: [Client.Kill] breaks the connection without a close frame, and
// [Client.Silence] keeps it open but answers no pings. Faults of a server: [Server.Kill]
// is its sudden death, [Redis.CutClient] its loss of Redis. Faults of the Redis, for all
// clients: [Redis.Cut], [Redis.Hang], [Redis.Restart], [Redis.SetError],
// [Redis.FlushAll]. If go-redis cannot connect, it writes to standard error.
// redis.SetLogger turns that off. The limits of a mesh.Server apply in tests too: if a
// client sends hundreds of commands at one moment of a bubble, some of them wait
// (CommandsPerSecond), and thousands are a flood.
//
// # Differences from a real Redis
//
// The Redis is miniredis with the parts that mesh also needs: a clock that runs, expired
// events, CONFIG for notify-keyspace-events, INFO with a run_id, and faults. Its
// connections are made in memory (see [WithAddr] for a port).
//
// Time stands still while a command, script or transaction runs. TIME and every TTL
// follow one clock. It is moved before each command, and by a tick between commands. In a
// bubble that clock is exact. Outside a bubble, moving the clock takes at most about a
// tenth of the time, so the clock becomes coarser with the number of keys: about 1 ms
// with a thousand keys, 20 ms with ten thousand, a quarter of a second with a hundred
// thousand, which is too many.
//
// A key that runs out is gone for the next command. Its event is published by then, or at
// the next tick (see [WithTick]). A real Redis may take minutes for that, or never
// publish it. Code that needs the event is wrong, and [WithoutExpiredEvents] shows it. As
// in a new Redis, notify-keyspace-events is empty at first, so nothing is published until
// a client sets it. No events other than "expired" exist.
//
// Features that miniredis lacks are missing here too, for example cluster slots, sharded
// pub/sub and the cmsgpack, struct and bit libraries of Lua. Scripts may use keys that
// they did not declare. Test against a real Redis as well: outside a bubble,
// [StartServer] also accepts a server with a client of a real Redis.
package meshtest
