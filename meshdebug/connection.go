package meshdebug

import (
	"context"
	"encoding/json"
	"errors"

	"github.com/meshpresence/mesh"
)

// connectionPart is the part of the page about one connection.
type connectionPart struct {
	part
	ID string `json:"id"`
	// Known is nil if Redis did not say whether a server has the connection.
	Known       *bool            `json:"known"`
	Server      string           `json:"server,omitempty"`
	ServerName  string           `json:"serverName,omitempty"`
	ServerState string           `json:"serverState,omitempty"`
	Self        bool             `json:"self"`
	Hidden      bool             `json:"hidden"`
	Metadata    json.RawMessage  `json:"metadata,omitempty"`
	Rooms       []connectionRoom `json:"rooms"`
}

// connectionRoom is a room that a connection is in. Entry is nil if Redis holds none or
// did not answer.
type connectionRoom struct {
	Name  string `json:"name"`
	Entry *entry `json:"entry"`
}

func (h *handler) connection(ctx context.Context, id string) *connectionPart {
	info, err := h.source.Connections().Find(ctx, id)
	p := &connectionPart{
		part: failed(err), ID: id, Server: info.Server, Self: info.Self,
		Hidden: h.opts.HideData, Rooms: make([]connectionRoom, len(info.Rooms)),
	}
	if known := info.ID != ""; known || errors.Is(err, mesh.ErrUnknownConnection) {
		p.Known = &known
	}
	if !h.opts.HideData {
		p.Metadata = valid(info.Metadata)
	}
	for i, r := range info.Rooms {
		p.Rooms[i].Name = r.Room
		if r.Entry.ID != "" {
			e := h.entry(r.Entry)
			p.Rooms[i].Entry = &e
		}
	}
	return p
}

// entry returns the part of an entry that the page shows.
func (h *handler) entry(e mesh.Entry) entry {
	one := entry{
		ConnectionID: e.ConnectionID, UserID: e.UserID, ID: e.ID, Server: e.Server, JoinedAt: e.JoinedAt.UTC(), TTL: seconds(e.TTL), Seq: e.Seq,
	}
	if !e.KeptUntil.IsZero() {
		until := e.KeptUntil.UTC()
		one.KeptUntil = &until
	}
	if h.opts.HideData {
		return one
	}
	one.Metadata, one.State, one.StateSilent = valid(e.Metadata), valid(e.State), e.StateSilent
	if !e.StateUntil.IsZero() {
		until := e.StateUntil.UTC()
		one.StateUntil = &until
	}
	return one
}

// owners fills in the names and states of the servers of the connection and its entries.
func (p *connectionPart) owners(servers *serversPart) {
	if servers.err != nil {
		return
	}
	known := servers.byIncarnation()
	if p.Server != "" {
		s := known.of(p.Server)
		p.ServerName, p.ServerState = s.Name, s.State
	}
	for _, r := range p.Rooms {
		if r.Entry != nil {
			r.Entry.owner(known)
		}
	}
}

// Unanswered reports whether another server has the connection and did not answer in
// which rooms it is, although Redis answered.
func (p *connectionPart) Unanswered() bool {
	return p != nil && p.err != nil && p.Known != nil && *p.Known && !p.Self && len(p.Rooms) == 0
}

// byID maps incarnations to servers.
type byID map[string]server

func (s *serversPart) byIncarnation() byID {
	known := make(byID, len(s.List))
	for _, one := range s.List {
		known[one.Incarnation] = one
	}
	return known
}

// of returns a server. Its state is "unknown" if it is on no list.
func (m byID) of(incarnation string) server {
	s, ok := m[incarnation]
	if !ok {
		s.State = "unknown"
	}
	return s
}

// owner fills in the name and state of the entry's server.
func (e *entry) owner(known byID) {
	if e.KeptUntil != nil {
		return // no server owns a kept place
	}
	s := known.of(e.Server)
	e.ServerName, e.ServerState, e.Self = s.Name, s.State, s.Self
}
