package load

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// JoinsConfig is connections that enter and exit rooms.
type JoinsConfig struct {
	Addr    string
	Dialect Dialect
	Rooms   int // room0, room1, …
	Workers int // connections that come and go, one request at a time each
	Seconds float64
}

// JoinsResult says how often that was done.
type JoinsResult struct {
	Joins   int
	Seconds float64
}

// Joins has the workers enter and exit.
func Joins(cfg JoinsConfig) (JoinsResult, error) {
	var joins atomic.Int64
	var working sync.WaitGroup
	failed := make(chan error, cfg.Workers)
	begun := time.Now()
	end := begun.Add(time.Duration(cfg.Seconds * 1e9))
	for w := range cfg.Workers {
		working.Go(func() {
			c, err := cfg.Dialect.Open(cfg.Addr, 16<<10)
			if err != nil {
				failed <- err
				return
			}
			defer c.Close()
			for i := w; time.Now().Before(end); i++ {
				room := fmt.Sprintf("room%d", i%cfg.Rooms)
				if err := errorsOf(cfg.Dialect.Enter(c, room), cfg.Dialect.Exit(c, room)); err != nil {
					failed <- err
					return
				}
				joins.Add(1)
			}
		})
	}
	working.Wait()
	select {
	case err := <-failed:
		return JoinsResult{}, err
	default:
	}
	return JoinsResult{Joins: int(joins.Load()), Seconds: time.Since(begun).Seconds()}, nil
}
