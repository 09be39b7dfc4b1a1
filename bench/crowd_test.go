package bench

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/bench/internal/peer"
)

// crowd is many connections, each in one room, on servers without sockets, or one
// server's share of them.
type crowd struct {
	Name       string // beginning of the connections' ids
	Entries    int
	Rooms      int
	RoomPrefix string

	Servers, Server int     // number of shares, and the number of this one; 0 servers: all
	PerSecond       float64 // of all shares together; 0: as fast as possible
	Begin           int64   // unix ns, if there is a rate
}

func (c crowd) room(i int) string { return fmt.Sprintf("%s%d", c.RoomPrefix, i%c.Rooms) }
func (c crowd) conn(i int) string { return fmt.Sprintf("%s-%d", c.Name, i) }

// share returns the share of one of several servers.
func (c crowd) share(server, servers int) crowd {
	c.Server, c.Servers = server, servers
	return c
}

// each calls do for every entry of the share, many at once, each at its time.
func (c crowd) each(do func(i int) error) error {
	const atOnce = 256
	next := make(chan int)
	go func() {
		defer close(next)
		for i := c.Server; i < c.Entries; i += max(c.Servers, 1) {
			if c.PerSecond > 0 {
				time.Sleep(time.Until(time.Unix(0, c.Begin).Add(time.Duration(float64(i) / c.PerSecond * 1e9))))
			}
			next <- i
		}
	}()
	var wg sync.WaitGroup
	var mu sync.Mutex // guards all
	var all error
	for range atOnce {
		wg.Go(func() {
			for i := range next {
				if err := do(i); err != nil {
					mu.Lock()
					all = errors.Join(all, err)
					mu.Unlock()
				}
			}
		})
	}
	wg.Wait()
	return all
}

// member is the member of this process, once it has been started.
var member *peer.Member

// crowdJob returns a job that calls do for every entry of a share.
func crowdJob(name string, do func(ctx context.Context, c crowd, i int) error) job[crowd, bool] {
	return newJob(name, func(c crowd) (bool, error) {
		return true, c.each(func(i int) error { return do(context.Background(), c, i) })
	})
}

var (
	// startMember returns the server's incarnation.
	startMember = newJob("member", func(cfg peer.MemberConfig) (_ string, err error) {
		if member, err = peer.NewBareMember(context.Background(), cfg); err != nil { // ends with the process
			return "", err
		}
		return member.Presence.Stats().Incarnation, nil
	})
	stopMember = newJob("stop", func(bool) (bool, error) { return true, member.Stop(context.Background(), 0) })
	statsOf    = newJob("stats", func(bool) (mesh.Stats, error) { return member.Presence.Stats(), nil })

	connectCrowd = crowdJob("connect", func(ctx context.Context, c crowd, i int) error {
		return member.Presence.Connect(ctx, c.conn(i), nil)
	})
	joinCrowd = crowdJob("join", func(ctx context.Context, c crowd, i int) error {
		return member.Presence.Join(ctx, c.room(i), c.conn(i))
	})
	stateCrowd = crowdJob("state", func(ctx context.Context, c crowd, i int) error {
		return member.Presence.PublishState(ctx, c.room(i), c.conn(i), map[string]int{"n": i}, mesh.StateOptions{})
	})
	leaveCrowd = crowdJob("leave", func(ctx context.Context, c crowd, i int) error {
		_, err := member.Presence.Leave(ctx, c.room(i), c.conn(i))
		return err
	})
)
