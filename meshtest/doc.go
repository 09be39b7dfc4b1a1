// Package meshtest runs a Redis inside the process: for tests of programs that
// use mesh, and for trying mesh without installing anything.
//
// It is miniredis with what mesh needs besides: a clock that runs, expired
// events, CONFIG for notify-keyspace-events, INFO with a run_id, and faults
// that can be switched on and off. Connections to it are made in memory, so
// it opens no port (see [WithAddr] for one) and works inside a
// [testing/synctest] bubble, where its clock is the bubble's clock.
//
//	rdb := meshtest.StartRedis(t).Client()
//
// # How true it is
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
// keys that they did not declare. Test against a real Redis as well.
package meshtest
