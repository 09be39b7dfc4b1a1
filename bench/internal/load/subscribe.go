package load

import (
	"fmt"
	"slices"
	"sync"
	"time"
)

// SubscribeConfig describes connections that subscribe to a room repeatedly.
type SubscribeConfig struct {
	Addr        string
	Room        string
	Connections int
	Times       int // each
}

// SubscribeResult holds the median time of a subscription, from the request to the last
// byte of the answer, the time of all subscriptions, and the size of the answer.
type SubscribeResult struct {
	P50, Seconds float64
	Bytes        int
}

// Subscribe runs the load, in Mesh's dialect.
func Subscribe(cfg SubscribeConfig) (SubscribeResult, error) {
	var (
		mu     sync.Mutex // guards the following
		took   []time.Duration
		size   int
		failed error
	)
	one := func() error {
		c, err := Mesh.Open(cfg.Addr, 64<<10)
		if err != nil {
			return err
		}
		defer c.Close()
		for range cfg.Times {
			begun := time.Now()
			if err := c.Write(fmt.Appendf(nil, `{"id":2,"command":"mesh/subscribe-presence","payload":{"roomName":%q}}`, cfg.Room)); err != nil {
				return err
			}
			answer, err := c.await(`{"id":2,`)
			if err != nil {
				return err
			}
			mu.Lock()
			took, size = append(took, time.Since(begun)), len(answer)
			mu.Unlock()
			if err := Mesh.ask(c, fmt.Appendf(nil, `{"id":2,"command":"mesh/unsubscribe-presence","payload":{"roomName":%q}}`, cfg.Room)); err != nil {
				return err
			}
		}
		return nil
	}
	begun := time.Now()
	var working sync.WaitGroup
	for range cfg.Connections {
		working.Go(func() {
			if err := one(); err != nil {
				mu.Lock()
				failed = err
				mu.Unlock()
			}
		})
	}
	working.Wait()
	if failed != nil {
		return SubscribeResult{}, failed
	}
	slices.Sort(took)
	return SubscribeResult{P50: took[len(took)/2].Seconds(), Seconds: time.Since(begun).Seconds(), Bytes: size}, nil
}
