// Package meshtest tests programs that use mesh: it runs a Redis, your server
// and clients of the wire protocol inside the test's process. It opens no port
// and needs nothing installed, and in a [testing/synctest] bubble a minute costs
// some hundredths of a second.
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
// To test what you deploy, give [StartServer] your own handler with its routes
// and middleware, and the mesh server in it: StartServer(t, mux, srv). Several
// servers on one Redis are as many calls of StartServer, each with a client of
// its own from [Redis.Client].
//
// A [Client] has a method for each command of the protocol, and [Client.Call]
// for yours. [Client.NextUpdate], [Client.ExpectUpdate] and
// [Client.AwaitUpdate] wait for what its subscriptions tell,
// [Client.NextPush] for your own pushes, [Client.NoUpdate] for nothing. What is
// expected to be refused comes back as an error: from [Server.Dial] a
// [*HandshakeError], from Call a [*CommandError]. Everything else fails the
// test by itself. The file usage_test.go has whole tests of an app.
//
// A mesh.PresenceManager alone needs no more than [StartRedis]. [NewRedis],
// [NewServer] and [Server.Dial] are the same without a test, for an Example, or
// to try mesh without installing anything.
//
// # Time
//
// Inside [testing/synctest.Test] everything has to be started in the bubble; then its
// time is that of the Redis, the servers and the clients. Let it pass with
// time.Sleep, or by waiting for what comes: TTLs run out, pings are sent,
// leases are renewed and lost. A client waits for [DefaultTimeout], 30 s of that
// time: for the end of a longer TTL sleep first, or connect [WithTimeout].
// [testing/synctest.Wait] is rarely needed, since all that fetches something waits for
// it. Outside a bubble the same test runs in real time; there give bounds that
// a slow machine keeps, and connect with [WithTimeout].
//
// [Redis.Advance] is something else: it moves the clock of the Redis alone, as
// when the clock of its machine is set.
//
// # Faults
//
// Of a client: [Client.Kill] breaks the connection without a close frame,
// [Client.Silence] keeps it open and answers no pings. Of a server:
// [Server.Kill] is its sudden death, [Redis.CutClient] its loss of Redis. Of
// the Redis, for all: [Redis.Cut], [Redis.Hang], [Redis.Restart],
// [Redis.SetError], [Redis.FlushAll]. go-redis writes to the standard error
// that it cannot connect; redis.SetLogger keeps it quiet. A mesh.Server's limits
// hold in tests too: a client that sends hundreds of commands at one moment of
// a bubble is told ELIMIT.
//
// # How true the Redis is
//
// It is miniredis with what mesh needs besides: a clock that runs, expired
// events, CONFIG for notify-keyspace-events, INFO with a run_id, and faults.
// Its connections are made in memory (see [WithAddr] for a port).
//
// Time stands still while a command, script or transaction runs, and both TIME
// and every TTL follow one clock, which is moved before each command and on a
// tick in between. In a bubble that clock is exact. Outside one it takes care
// to use no more than about a tenth of the time, so it becomes coarser with
// the number of keys: about 1 ms with a thousand keys, 20 ms with ten
// thousand, a quarter of a second with a hundred thousand, which is too many.
//
// A key that runs out is gone for the next command, and its event is published
// by then, or at the next tick (see [WithTick]). A real Redis may take minutes
// for that, or never publish it; code that needs the event is wrong, and
// [WithoutExpiredEvents] shows it. As in a new Redis, notify-keyspace-events is
// empty at first, so nothing is published until somebody sets it. Events other
// than "expired" do not exist.
//
// What miniredis lacks is missing here too, among it cluster slots, sharded
// pub/sub and the cmsgpack, struct and bit libraries of Lua. Scripts may touch
// keys that they did not declare. Test against a real Redis as well: a server
// whose Redis client is of a real one can be given to [StartServer] too,
// outside a bubble.
package meshtest
