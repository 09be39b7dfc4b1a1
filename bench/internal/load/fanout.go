package load

import (
	"bytes"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// FanoutConfig describes one publisher and many subscribers of one room.
type FanoutConfig struct {
	Addrs       []string // servers; subscribers are spread over them
	Dialect     Dialect
	Room        string
	Subscribers int
	Events      int
	InFlight    int     // largest number of events that are published and not yet acknowledged
	PerSecond   float64 // events per second; 0: as fast as InFlight allows
}

// FanoutResult holds the measurements of Fanout. Times are in seconds.
type FanoutResult struct {
	Events    int // published
	Delivered int // to all subscribers together
	Seconds   float64
	P50, P99  float64 // from publishing to reading, of every delivery, if PerSecond is set
}

// Fanout publishes states and returns when every subscriber has received the last one.
func Fanout(cfg FanoutConfig) (FanoutResult, error) {
	audience := make([]*Conn, cfg.Subscribers)
	defer closeAll(audience)
	for i := range audience {
		c, err := cfg.Dialect.Open(cfg.Addrs[i%len(cfg.Addrs)], 16<<10)
		if err != nil {
			return FanoutResult{}, err
		}
		audience[i] = c
		if err := cfg.Dialect.Watch(c, cfg.Room); err != nil {
			return FanoutResult{}, err
		}
	}
	speaker, err := cfg.Dialect.Open(cfg.Addrs[0], 16<<10)
	if err != nil {
		return FanoutResult{}, err
	}
	defer speaker.Close()
	if err := cfg.Dialect.Enter(speaker, cfg.Room); err != nil {
		return FanoutResult{}, err
	}
	var delivered atomic.Int64
	lags := make([][]time.Duration, len(audience))
	failed := make(chan error, len(audience)+2)
	last := fmt.Appendf(nil, `"n":%d,`, cfg.Events-1)
	var reading sync.WaitGroup
	for i, c := range audience {
		reading.Go(func() {
			n, err := listen(c, cfg, last, &lags[i])
			delivered.Add(int64(n))
			if err != nil {
				failed <- fmt.Errorf("subscriber %d after %d events: %w", i, n, err)
			}
		})
	}
	begun := time.Now()
	if err := speak(speaker, cfg); err != nil {
		return FanoutResult{}, err
	}
	reading.Wait()
	r := FanoutResult{Events: cfg.Events, Delivered: int(delivered.Load()), Seconds: time.Since(begun).Seconds()}
	select {
	case err := <-failed:
		return r, err
	default:
	}
	r.P50, r.P99 = percentiles(slices.Concat(lags...))
	return r, nil
}

// listen reads until the last event, and returns the number of events.
func listen(c *Conn, cfg FanoutConfig, last []byte, lags *[]time.Duration) (n int, err error) {
	for {
		frame, err := c.Next()
		if err != nil {
			return n, err
		}
		now := time.Now()
		for line := range bytes.Lines(frame) {
			if !cfg.Dialect.event(line) {
				continue
			}
			n++
			if cfg.PerSecond > 0 {
				*lags = append(*lags, now.Sub(sentAt(line)))
			}
			if bytes.Contains(line, last) {
				return n, nil
			}
		}
	}
}

// sentAt reads the time of publishing an event: its field "t", in unix ns.
func sentAt(line []byte) time.Time {
	_, rest, _ := bytes.Cut(line, []byte(`"t":`))
	end := bytes.IndexByte(rest, '}')
	ns, _ := strconv.ParseInt(string(rest[:max(end, 0)]), 10, 64)
	return time.Unix(0, ns)
}

// speak publishes all events, with InFlight in flight or at the rate of PerSecond.
func speak(c *Conn, cfg FanoutConfig) error {
	places := make(chan struct{}, cfg.InFlight)
	stopped := make(chan error, 1)
	go func() { // ends with the last answer, or the connection
		for answers := 0; answers < cfg.Events; {
			frame, err := c.Next()
			if err != nil {
				stopped <- err
				return
			}
			for line := range bytes.Lines(frame) {
				if bytes.HasPrefix(line, []byte(`{"id":`)) {
					answers++
					<-places
				}
			}
		}
		stopped <- nil
	}()
	begun := time.Now()
	var request []byte
	for n := range cfg.Events {
		if cfg.PerSecond > 0 {
			time.Sleep(time.Until(begun.Add(time.Duration(float64(n) / cfg.PerSecond * 1e9))))
		}
		select {
		case places <- struct{}{}:
		case err := <-stopped:
			return err
		}
		state := fmt.Appendf(nil, `{"x":512,"y":384,"n":%d,"t":%d}`, n, time.Now().UnixNano())
		request = cfg.Dialect.publish(request[:0], 10+n, cfg.Room, state)
		if err := c.Write(request); err != nil {
			return err
		}
	}
	return <-stopped
}

// percentiles returns the median and the 99th percentile, in seconds.
func percentiles(all []time.Duration) (p50, p99 float64) {
	if len(all) == 0 {
		return 0, 0
	}
	slices.Sort(all)
	return all[len(all)/2].Seconds(), all[len(all)*99/100].Seconds()
}

func closeAll(conns []*Conn) {
	for _, c := range conns {
		if c != nil {
			_ = c.Close()
		}
	}
}
