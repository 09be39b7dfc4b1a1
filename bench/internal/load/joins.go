package load

import (
	"fmt"
	"slices"
	"sync"
	"time"
)

// JoinsConfig describes connections that join and leave rooms.
type JoinsConfig struct {
	Addr    string
	Dialect Dialect
	Rooms   int // room0, room1, …
	Workers int // connections, with one request at a time each
	Seconds float64
}

// JoinsResult holds the number of joins and their median time.
type JoinsResult struct {
	Joins   int
	Seconds float64
	P50     float64 // seconds
}

// Joins makes the workers join and leave.
func Joins(cfg JoinsConfig) (JoinsResult, error) {
	var mu sync.Mutex // guards took
	var took []time.Duration
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
			var own []time.Duration
			now := time.Now()
			for i := w; now.Before(end); i++ {
				room := fmt.Sprintf("room%d", i%cfg.Rooms)
				err := cfg.Dialect.Enter(c, room)
				own = append(own, time.Since(now))
				if err := errorsOf(err, cfg.Dialect.Exit(c, room)); err != nil {
					failed <- err
					return
				}
				now = time.Now()
			}
			mu.Lock()
			took = append(took, own...)
			mu.Unlock()
		})
	}
	working.Wait()
	select {
	case err := <-failed:
		return JoinsResult{}, err
	default:
	}
	slices.Sort(took)
	return JoinsResult{Joins: len(took), Seconds: time.Since(begun).Seconds(), P50: took[len(took)/2].Seconds()}, nil
}
