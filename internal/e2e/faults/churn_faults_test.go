//go:build unix

package faults

import (
	"syscall"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/redistest"
)

// churnFault is a fault that lasts for a random time between least and most, in leases.
type churnFault struct {
	name        string
	least, most float64
	isolates    bool // cuts one server off from Redis, so that others may declare it dead
	child       bool // needs a child process
	inject      func(ct *churnTest, on *serverSlot, d time.Duration)
}

var churnFaultList = []churnFault{
	// Processes.
	{name: "killed", child: true, inject: killed},
	{name: "stopped in order", child: true, inject: stopped},
	{name: "paused, shorter", least: 0.1, most: 0.5, child: true, isolates: true, inject: pausedFor},
	{name: "paused, longer", least: 1.5, most: 2, child: true, isolates: true, inject: pausedFor},

	// The network of one server.
	{name: "cut, shorter", least: 0.1, most: 0.5, isolates: true, inject: network((*redistest.ProxyServer).Cut)},
	{name: "cut, longer", least: 1.5, most: 2, isolates: true, inject: network((*redistest.ProxyServer).Cut)},
	{name: "black hole, shorter", least: 0.1, most: 0.5, isolates: true, inject: network(blackHole)},
	{name: "black hole, longer", least: 1.5, most: 2, isolates: true, inject: network(blackHole)},
	{name: "requests swallowed", least: 0.2, most: 2, isolates: true, inject: network(dropRequests)},
	{name: "replies swallowed", least: 0.2, most: 2, isolates: true, inject: network(dropReplies)},
	{name: "half open, requests", least: 0.1, most: 0.2, isolates: true, inject: network(halfOpen(redistest.Requests))},
	{name: "half open, replies", least: 0.1, most: 0.2, isolates: true, inject: network(halfOpen(redistest.Replies))},
	{name: "held back", least: 0.1, most: 1.5, isolates: true, inject: network(stall)},
	{name: "delayed", least: 0.5, most: 1.5, isolates: true, inject: network(delay)},

	// The network of all.
	{name: "all cut", least: 0.2, most: 2, inject: networks((*redistest.ProxyServer).Cut)},
	{name: "all in a black hole", least: 0.2, most: 2, inject: networks(blackHole)},
	{name: "all without replies", least: 0.2, most: 2, inject: networks(dropReplies)},
	{name: "all delayed", least: 0.5, most: 1.5, inject: networks(delay)},

	// Redis.
	{name: "redis paused", least: 0.2, most: 2, inject: redisPaused},
	{name: "redis killed, empty", least: 0, most: 1.5, inject: redisKilled(redistest.Nothing)},
	{name: "redis killed, dump", least: 0, most: 1.5, inject: redisKilled(redistest.LastSave)},
	{name: "redis killed, append-only", least: 0, most: 1.5, inject: redisKilled(redistest.EveryWrite)},
	{name: "redis flushed", inject: flushed},
	{name: "clients killed", least: 0.2, most: 0.6, inject: clientsKilled("normal")},
	{name: "subscribers killed", least: 0.2, most: 0.6, inject: clientsKilled("pubsub")},
	{name: "scripts forgotten", least: 0.2, most: 0.6, inject: scriptsForgotten},
	{name: "memory full", least: 0.5, most: 2, inject: refusing(harness.MemoryFull)},
	{name: "no replicas", least: 0.5, most: 2, inject: refusing(harness.NoReplicas)},
	{name: "read only", least: 0.5, most: 2, inject: refusing(harness.ReadOnly)},
}

func killed(_ *churnTest, on *serverSlot, _ time.Duration) {
	on.takeChild().Die()
	on.start()
}

func stopped(ct *churnTest, on *serverSlot, _ time.Duration) {
	require.NoError(ct.T, on.takeChild().Stop())
	on.start()
}

func pausedFor(ct *churnTest, on *serverSlot, d time.Duration) {
	p := on.remote.Cmd.Process
	require.NoError(ct.T, p.Signal(syscall.SIGSTOP))
	ct.Sleep(d)
	require.NoError(ct.T, p.Signal(syscall.SIGCONT))
}

func blackHole(p *redistest.ProxyServer) { p.BlackHole(true) }

func dropRequests(p *redistest.ProxyServer) { p.DropRequests(true) }

func dropReplies(p *redistest.ProxyServer) { p.DropReplies(true) }

func stall(p *redistest.ProxyServer) { p.Stall(true) }

func delay(p *redistest.ProxyServer) { p.Delay(60 * time.Millisecond) }

func halfOpen(h redistest.Half) func(p *redistest.ProxyServer) {
	return func(p *redistest.ProxyServer) { p.HalfOpen(h) }
}

func network(begin func(p *redistest.ProxyServer)) func(*churnTest, *serverSlot, time.Duration) {
	return func(ct *churnTest, on *serverSlot, d time.Duration) {
		begin(on.proxy)
		ct.Sleep(d)
		on.proxy.Heal()
	}
}

func networks(begin func(p *redistest.ProxyServer)) func(*churnTest, *serverSlot, time.Duration) {
	return func(ct *churnTest, _ *serverSlot, d time.Duration) {
		for _, p := range ct.slots {
			begin(p.proxy)
		}
		ct.Sleep(d)
		for _, p := range ct.slots {
			p.proxy.Heal()
		}
	}
}

func redisPaused(ct *churnTest, _ *serverSlot, d time.Duration) {
	ct.Real.Pause()
	ct.Sleep(d)
	ct.Real.Resume()
}

func redisKilled(saved redistest.Saved) func(*churnTest, *serverSlot, time.Duration) {
	return func(ct *churnTest, _ *serverSlot, d time.Duration) {
		if saved == redistest.LastSave {
			ct.beginRollback() // before the save, because a write in flight may arrive after it
			require.NoError(ct.T, ct.admin.Save(ct.T.Context()).Err())
			ct.Sleep(300 * time.Millisecond) // the rollback loses these changes
		}
		ct.Real.Kill()
		ct.Sleep(d)
		ct.Real.RestartFrom(saved)
	}
}

func flushed(ct *churnTest, _ *serverSlot, _ time.Duration) {
	require.NoError(ct.T, ct.admin.FlushAll(ct.T.Context()).Err())
}

// often calls a function repeatedly.
func (ct *churnTest) often(d time.Duration, do func() error) {
	for until := time.Now().Add(d); time.Now().Before(until); ct.Sleep(40 * time.Millisecond) {
		require.NoError(ct.T, do())
	}
}

func clientsKilled(kind string) func(*churnTest, *serverSlot, time.Duration) {
	return func(ct *churnTest, _ *serverSlot, d time.Duration) {
		ct.often(d, func() error {
			return ct.admin.ClientKillByFilter(ct.T.Context(), "TYPE", kind, "SKIPME", "yes").Err()
		})
	}
}

func scriptsForgotten(ct *churnTest, _ *serverSlot, d time.Duration) {
	ct.often(d, func() error { return ct.admin.ScriptFlush(ct.T.Context()).Err() })
}

func refusing(r harness.Refusal) func(*churnTest, *serverSlot, time.Duration) {
	return func(ct *churnTest, _ *serverSlot, d time.Duration) {
		require.NoError(ct.T, r.Begin(ct.T.Context(), ct.admin))
		ct.Sleep(d)
		require.NoError(ct.T, r.End(ct.T.Context(), ct.admin))
	}
}
