package mesh

import (
	"context"
	"encoding/json"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

// EntryQuery says which entries of a room are wanted.
type EntryQuery struct {
	// Cursor is the Next of the page before. Defaults to "": the first page.
	Cursor string
	// Limit is about how many, 1 to 1,000. Defaults to 100.
	Limit int
}

// Entry is one connection in a room, as Redis holds it: what a Member says and
// who answers for it.
type Entry struct {
	ConnectionID string
	// ID is minted by each join: a connection that left and came back has
	// another one.
	ID string
	// Server is the Incarnation of the server that holds the connection.
	Server   string
	Metadata json.RawMessage // nil: none
	State    json.RawMessage // nil: none
	// StateSilent says that the state was published without telling it.
	StateSilent bool
	// StateUntil is when the state expires; zero: it does not.
	StateUntil time.Time
	// JoinedAt is when it joined, by Redis's clock.
	JoinedAt time.Time
	// TTL is how long it may be silent, by the rule of its server; 0: for ever.
	TTL time.Duration
	// Seq is the room's number of its last change.
	Seq uint64
}

// EntryPage is a part of a room's entries.
type EntryPage struct {
	Room string
	// Epoch and Seq are where the room stood when reading began. Epoch is empty
	// where Redis knows nothing of the room.
	Epoch   string
	Seq     uint64
	Now     time.Time // when that was, by Redis's clock
	Total   int       // entries of the room
	Entries []Entry
	Next    string // the Cursor of the next page; "": this was the last
}

// Entries returns a page of what Redis holds of a room: for whoever wants to
// know why somebody is in it, and which server says so. Members and Snapshot
// events are what an app shows. A room of no more than Limit is of one moment,
// sorted by connection id; a larger one comes in pages in Redis's own order,
// each of which may hold some entries more, or fewer, than Limit. Who is in all
// the while comes at least once in all pages together.
//
// No guard is asked: the app itself is asking. It reads from masters, writes
// nothing, and takes at most two seconds. Errors wrap ErrUnavailable,
// ErrInvalidRoom, or ErrInvalidOptions where the query is wrong.
func (m *RoomManager) Entries(ctx context.Context, room string, q EntryQuery) (EntryPage, error) {
	if err := m.n.use(ctx, room); err != nil {
		return EntryPage{}, err
	}
	limit, err := pageLimit("EntryQuery.Limit", q.Limit)
	if err != nil {
		return EntryPage{}, err
	}
	at, err := parseCursor("EntryQuery.Cursor", q.Cursor, 1)
	if err != nil {
		return EntryPage{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, lookLimit)
	defer cancel()
	found, err := m.n.store.EntriesFrom(ctx, room, at, limit)
	if err != nil {
		return EntryPage{}, m.n.errorFor(ctx, err)
	}
	page := EntryPage{
		Room: room, Epoch: found.Position.Epoch, Seq: found.Position.Seq, Now: time.UnixMilli(found.Now),
		Total: found.Total, Entries: make([]Entry, len(found.Records)),
	}
	for i := range found.Records {
		page.Entries[i] = entryOf(&found.Records[i])
	}
	if found.More {
		page.Next = cursorText(found.Next)
	}
	return page, nil
}

func entryOf(r *store.Record) Entry {
	e := Entry{
		ConnectionID: r.Conn, ID: r.Entry, Server: r.Incarnation, Metadata: r.Meta, State: r.State,
		StateSilent: r.StateSilent, JoinedAt: time.UnixMilli(r.JoinedAt), TTL: r.TTL, Seq: r.Seq,
	}
	if r.StateUntil > 0 {
		e.StateUntil = time.UnixMilli(r.StateUntil)
	}
	return e
}
