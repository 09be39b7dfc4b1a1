package load

import (
	"fmt"
	"sync"
)

// HoldConfig describes connections that stay open and silent.
type HoldConfig struct {
	Addr        string
	Dialect     Dialect
	Connections int
	Rooms       int    // that each connection is in
	Names       int    // number of rooms in all
	Watch       string // a room that each subscribes to; "": none
	Drain       bool   // read the messages to the clients
}

// Held holds the connections of Hold.
type Held struct {
	conns   []*Conn
	reading sync.WaitGroup
}

// dialers is the number of connections that are opened at once.
const dialers = 32

// Hold opens the connections and returns when all are in their rooms.
func Hold(cfg HoldConfig) (*Held, error) {
	h := &Held{conns: make([]*Conn, cfg.Connections)}
	var opening sync.WaitGroup
	failed := make(chan error, dialers)
	for d := range dialers {
		opening.Go(func() {
			for i := d; i < cfg.Connections; i += dialers {
				c, err := cfg.Dialect.Open(cfg.Addr, 4<<10)
				if err != nil {
					failed <- fmt.Errorf("connection %d: %w", i, err)
					return
				}
				h.conns[i] = c
				if cfg.Watch != "" {
					if err := cfg.Dialect.Watch(c, cfg.Watch); err != nil {
						failed <- fmt.Errorf("connection %d: %w", i, err)
						return
					}
				}
				for r := range cfg.Rooms {
					if err := cfg.Dialect.Enter(c, fmt.Sprintf("room%d", (i+r)%cfg.Names)); err != nil {
						failed <- fmt.Errorf("connection %d, room %d: %w", i, r, err)
						return
					}
				}
			}
		})
	}
	opening.Wait()
	select {
	case err := <-failed:
		h.Close()
		return nil, err
	default:
	}
	if cfg.Drain {
		for _, c := range h.conns {
			h.reading.Go(func() {
				for {
					if _, err := c.Next(); err != nil {
						return
					}
				}
			})
		}
	}
	return h, nil
}

// Close closes the connections.
func (h *Held) Close() {
	closeAll(h.conns)
	h.reading.Wait()
}
