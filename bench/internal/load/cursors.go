package load

import (
	"bytes"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// CursorsConfig describes members of one room who move their cursors.
type CursorsConfig struct {
	Addr       string
	Publishers int
	Watchers   int     // members that watch
	PerSecond  float64 // states that each publishes
	Seconds    float64
}

// CursorsResult holds the measurements of Cursors.
type CursorsResult struct {
	Frames  int     // states received by all watchers together
	Seconds float64 // from the first state until the last one was delivered
	Slowest float64 // seconds from the acceptance of the last states until all watchers had received them
	Busy    int     // states that were refused because too many waited
	Missing int     // last states that a watcher did not receive
}

// Cursors publishes, and returns when all watchers have received the last states.
func Cursors(cfg CursorsConfig) (CursorsResult, error) {
	conns := make([]*Conn, cfg.Publishers)
	defer closeAll(conns)
	var opening sync.WaitGroup
	failed := make(chan error, dialers)
	for d := range dialers {
		opening.Go(func() {
			for i := d; i < len(conns); i += dialers {
				c, err := Mesh.Open(cfg.Addr, 16<<10)
				if err == nil {
					conns[i] = c
					err = Mesh.Enter(c, "board")
				}
				if err == nil && i < cfg.Watchers {
					err = Mesh.Watch(c, "board")
				}
				if err != nil {
					failed <- fmt.Errorf("connection %d: %w", i, err)
					return
				}
			}
		})
	}
	opening.Wait()
	select {
	case err := <-failed:
		return CursorsResult{}, err
	default:
	}
	return move(cfg, conns)
}

// lastMark is in the last state that each member publishes.
const lastMark = `"last":true`

// board holds the counters that all members share.
type board struct {
	frames, lasts, busy atomic.Int64
	want                int64         // last states at all watchers together
	done                chan struct{} // closed when lasts has reached want
}

// pointer is one member.
type pointer struct {
	c       *Conn
	answers chan bool // whether a state was accepted
}

// move makes all members publish and read.
func move(cfg CursorsConfig, conns []*Conn) (CursorsResult, error) {
	b := &board{want: int64(cfg.Publishers * cfg.Watchers), done: make(chan struct{})}
	var reading, publishing sync.WaitGroup
	failed := make(chan error, len(conns))
	begun := time.Now()
	for i, c := range conns {
		p := &pointer{c: c, answers: make(chan bool, int(cfg.PerSecond*cfg.Seconds)+1)}
		reading.Go(func() { p.read(b) })
		publishing.Go(func() {
			if err := p.publish(cfg, i, begun); err != nil {
				failed <- fmt.Errorf("member %d: %w", i, err)
			}
		})
	}
	publishing.Wait()
	ended := time.Now()
	select {
	case err := <-failed:
		return CursorsResult{}, err
	case <-b.done:
	case <-time.After(30 * time.Second):
	}
	r := CursorsResult{
		Frames: int(b.frames.Load()), Busy: int(b.busy.Load()), Missing: int(b.want - b.lasts.Load()),
		Seconds: time.Since(begun).Seconds(), Slowest: time.Since(ended).Seconds(),
	}
	closeAll(conns)
	reading.Wait()
	return r, nil
}

// read reads until the connection ends.
func (p *pointer) read(b *board) {
	defer close(p.answers)
	for {
		frame, err := p.c.Next()
		switch {
		case err != nil:
			return
		case bytes.HasPrefix(frame, []byte(`{"id":`)):
			taken := !bytes.Contains(frame, []byte(`"code":"EBUSY"`)) // a state that is only late is accepted
			if !taken {
				b.busy.Add(1)
			}
			p.answers <- taken
		case Mesh.event(frame):
			b.frames.Add(1)
			if bytes.Contains(frame, []byte(lastMark)) && b.lasts.Add(1) == b.want {
				close(b.done)
			}
		}
	}
}

// publish publishes one member's states at its rate, each member at its own moment. It
// repeats the last state until it has been accepted.
func (p *pointer) publish(cfg CursorsConfig, i int, begun time.Time) error {
	total := int(cfg.PerSecond * cfg.Seconds)
	offset := time.Duration(float64(i) / float64(cfg.Publishers) / cfg.PerSecond * 1e9)
	var request []byte
	say := func(n int, more string) error {
		state := fmt.Appendf(nil, `{"x":%d,"y":384,"n":%d%s}`, n, n, more)
		request = Mesh.publish(request[:0], 10+n, "board", state)
		return p.c.Write(request)
	}
	for n := range total - 1 {
		time.Sleep(time.Until(begun.Add(offset + time.Duration(float64(n)/cfg.PerSecond*1e9))))
		if err := say(n, ""); err != nil {
			return err
		}
	}
	for range total - 1 {
		if _, ok := <-p.answers; !ok {
			return errEnded
		}
	}
	for {
		if err := say(total-1, ","+lastMark); err != nil {
			return err
		}
		taken, ok := <-p.answers
		switch {
		case !ok:
			return errEnded
		case taken:
			return nil
		}
	}
}

var errEnded = errors.New("the server closed the connection")
