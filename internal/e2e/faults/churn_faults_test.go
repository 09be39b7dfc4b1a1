//go:build unix

package faults

import (
	"syscall"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/redistest"
)

// churnFault is something that goes wrong for a time that is drawn between
// least and most, in leases.
type churnFault struct {
	name        string
	least, most float64
	isolates    bool // one server from Redis: others may, or must, take it for dead
	child       bool // needs a process of its own
	strike      func(st *storm, on *post, d time.Duration)
}

var churnFaultList = []churnFault{
	// Processes.
	{name: "killed", child: true, strike: killed},
	{name: "stopped in order", child: true, strike: stopped},
	{name: "paused, shorter", least: 0.1, most: 0.5, child: true, isolates: true, strike: pausedFor},
	{name: "paused, longer", least: 1.5, most: 2, child: true, isolates: true, strike: pausedFor},

	// The network of one server.
	{name: "cut, shorter", least: 0.1, most: 0.5, isolates: true, strike: network((*redistest.ProxyServer).Cut)},
	{name: "cut, longer", least: 1.5, most: 2, isolates: true, strike: network((*redistest.ProxyServer).Cut)},
	{name: "black hole, shorter", least: 0.1, most: 0.5, isolates: true, strike: network(blackHole)},
	{name: "black hole, longer", least: 1.5, most: 2, isolates: true, strike: network(blackHole)},
	{name: "requests swallowed", least: 0.2, most: 2, isolates: true, strike: network(dropRequests)},
	{name: "replies swallowed", least: 0.2, most: 2, isolates: true, strike: network(dropReplies)},
	{name: "half open, requests", least: 0.1, most: 0.2, isolates: true, strike: network(halfOpen(redistest.Requests))},
	{name: "half open, replies", least: 0.1, most: 0.2, isolates: true, strike: network(halfOpen(redistest.Replies))},
	{name: "held back", least: 0.1, most: 1.5, isolates: true, strike: network(stall)},
	{name: "delayed", least: 0.5, most: 1.5, isolates: true, strike: network(delay)},

	// The network of all.
	{name: "all cut", least: 0.2, most: 2, strike: networks((*redistest.ProxyServer).Cut)},
	{name: "all in a black hole", least: 0.2, most: 2, strike: networks(blackHole)},
	{name: "all without replies", least: 0.2, most: 2, strike: networks(dropReplies)},
	{name: "all delayed", least: 0.5, most: 1.5, strike: networks(delay)},

	// Redis.
	{name: "redis paused", least: 0.2, most: 2, strike: redisPaused},
	{name: "redis killed, empty", least: 0, most: 1.5, strike: redisKilled(redistest.Nothing)},
	{name: "redis killed, dump", least: 0, most: 1.5, strike: redisKilled(redistest.LastSave)},
	{name: "redis killed, append-only", least: 0, most: 1.5, strike: redisKilled(redistest.EveryWrite)},
	{name: "redis flushed", strike: flushed},
	{name: "clients killed", least: 0.2, most: 0.6, strike: clientsKilled("normal")},
	{name: "subscribers killed", least: 0.2, most: 0.6, strike: clientsKilled("pubsub")},
	{name: "scripts forgotten", least: 0.2, most: 0.6, strike: scriptsForgotten},
	{name: "memory full", least: 0.5, most: 2, strike: refusing(harness.MemoryFull)},
	{name: "no replicas", least: 0.5, most: 2, strike: refusing(harness.NoReplicas)},
	{name: "read only", least: 0.5, most: 2, strike: refusing(harness.ReadOnly)},
}

func killed(_ *storm, on *post, _ time.Duration) {
	on.take().Die()
	on.start()
}

func stopped(st *storm, on *post, _ time.Duration) {
	require.NoError(st.T, on.take().Stop())
	on.start()
}

func pausedFor(st *storm, on *post, d time.Duration) {
	p := on.remote.Cmd.Process
	require.NoError(st.T, p.Signal(syscall.SIGSTOP))
	st.Sleep(d)
	require.NoError(st.T, p.Signal(syscall.SIGCONT))
}

func blackHole(p *redistest.ProxyServer) { p.BlackHole(true) }

func dropRequests(p *redistest.ProxyServer) { p.DropRequests(true) }

func dropReplies(p *redistest.ProxyServer) { p.DropReplies(true) }

func stall(p *redistest.ProxyServer) { p.Stall(true) }

func delay(p *redistest.ProxyServer) { p.Delay(60 * time.Millisecond) }

func halfOpen(h redistest.Half) func(p *redistest.ProxyServer) {
	return func(p *redistest.ProxyServer) { p.HalfOpen(h) }
}

func network(begin func(p *redistest.ProxyServer)) func(*storm, *post, time.Duration) {
	return func(st *storm, on *post, d time.Duration) {
		begin(on.proxy)
		st.Sleep(d)
		on.proxy.Heal()
	}
}

func networks(begin func(p *redistest.ProxyServer)) func(*storm, *post, time.Duration) {
	return func(st *storm, _ *post, d time.Duration) {
		for _, p := range st.posts {
			begin(p.proxy)
		}
		st.Sleep(d)
		for _, p := range st.posts {
			p.proxy.Heal()
		}
	}
}

func redisPaused(st *storm, _ *post, d time.Duration) {
	st.Real.Pause()
	st.Sleep(d)
	st.Real.Resume()
}

func redisKilled(saved redistest.Saved) func(*storm, *post, time.Duration) {
	return func(st *storm, _ *post, d time.Duration) {
		if saved == redistest.LastSave {
			st.goesBack() // before: what is under way may come later
			require.NoError(st.T, st.admin.Save(st.T.Context()).Err())
			st.Sleep(300 * time.Millisecond) // what happens now is lost
		}
		st.Real.Kill()
		st.Sleep(d)
		st.Real.RestartFrom(saved)
	}
}

func flushed(st *storm, _ *post, _ time.Duration) {
	require.NoError(st.T, st.admin.FlushAll(st.T.Context()).Err())
}

// often does something again and again.
func (st *storm) often(d time.Duration, do func() error) {
	for until := time.Now().Add(d); time.Now().Before(until); st.Sleep(40 * time.Millisecond) {
		require.NoError(st.T, do())
	}
}

func clientsKilled(kind string) func(*storm, *post, time.Duration) {
	return func(st *storm, _ *post, d time.Duration) {
		st.often(d, func() error {
			return st.admin.ClientKillByFilter(st.T.Context(), "TYPE", kind, "SKIPME", "yes").Err()
		})
	}
}

func scriptsForgotten(st *storm, _ *post, d time.Duration) {
	st.often(d, func() error { return st.admin.ScriptFlush(st.T.Context()).Err() })
}

func refusing(r harness.Refusal) func(*storm, *post, time.Duration) {
	return func(st *storm, _ *post, d time.Duration) {
		require.NoError(st.T, r.Begin(st.T.Context(), st.admin))
		st.Sleep(d)
		require.NoError(st.T, r.End(st.T.Context(), st.admin))
	}
}
