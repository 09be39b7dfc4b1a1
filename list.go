package mesh

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"hash/fnv"
	"strconv"
	"strings"
	"time"

	"github.com/meshpresence/mesh/internal/hub"
	"github.com/meshpresence/mesh/internal/socket"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/watch"
	"github.com/meshpresence/mesh/internal/wire"
)

// listPresence answers with a page of the members of a room. For a subscriber the page
// comes from the mirror, in order with the updates of the subscription. For others it is
// read from Redis.
func listPresence(ctx context.Context, c *Connection, req wire.Request) (reply, error) {
	n := c.core()
	var p wire.ListPresenceRequest
	if err := req.Bind(&p); err != nil {
		return reply{}, errPayload(err)
	}
	room := string(p.RoomName)
	if err := n.checkRoom(room); err != nil {
		return reply{}, err
	}
	size, err := p.Size()
	if err != nil {
		return reply{}, errPayload(err)
	}
	if most := n.opts.Limits.SnapshotMembers; most > 0 {
		size = min(size, most)
	}
	at, err := parseListCursor(string(p.Cursor))
	if err != nil {
		return reply{}, errPayload(err)
	}
	c.mu.Lock()
	s := c.subs[room]
	c.mu.Unlock()
	if s != nil {
		r, found, err := c.listMirror(ctx, req, s, at, size)
		if found || err != nil {
			return r, err
		}
	}
	answer, err := n.access.Read(ctx, c.id, room, wire.Snapshot{}, func() (any, error) { return n.listRedis(ctx, room, at, size) })
	return valueReply(answer), err
}

// listMirror answers with a page of the mirror. It returns false if the mirror has not been
// read yet.
func (c *Connection) listMirror(ctx context.Context, req wire.Request, s *watch.Subscription, at listCursor, size int) (reply, bool, error) {
	n := c.core()
	if err := n.access.Check(ctx, c.id, s.Room); watch.IsRefusal(err) {
		return valueReply(wire.Snapshot{}), true, nil
	} else if err != nil {
		return reply{}, false, err
	}
	// No other command about the room runs now, so that no new pause begins.
	if err := c.sock.AwaitUpdates(ctx, s.Room); err != nil {
		return reply{}, false, err
	}
	if err := socket.AwaitAnswerSlot(ctx); err != nil {
		return reply{}, false, err
	}
	answered := make(chan bool, 1) // deliver must not block
	deliver := func(p hub.Page, ok bool) {
		if ok {
			c.respond(req, n.listView(p, at), nil)
		}
		answered <- ok
	}
	var from hub.PageCursor
	if at.source == n.hub.PageList() {
		from = at.mirror
	}
	if !n.access.Page(s, from, size, deliver) {
		return reply{}, false, nil
	}
	select {
	case ok := <-answered:
		if ok {
			return answeredReply(), true, nil
		}
		return valueReply(wire.Snapshot{}), true, nil // the subscription has ended: a guard refuses now
	case <-ctx.Done():
		return reply{}, false, context.Cause(ctx)
	}
}

// listView returns the answer with a page of the mirror, which was asked for with a cursor.
func (n *core) listView(p hub.Page, at listCursor) wire.EncodedView {
	v := wire.EncodedView{Success: true, Present: p.Present, States: p.States, Extent: subscribeExtent(p.Listing)}
	v.Restart = p.Restart || at.source != "" && at.source != n.hub.PageList()
	if p.More {
		v.Next = listCursor{source: n.hub.PageList(), mirror: p.Next}.String()
	}
	return v
}

// listAttempts bounds the reads of one page. It is read again if the Redis process is
// another one than before.
const listAttempts = 3

// listRedis reads a page of a room from Redis.
func (n *core) listRedis(ctx context.Context, room string, at listCursor, size int) (any, error) {
	if err := socket.AwaitAnswerSlot(ctx); err != nil {
		return nil, err
	}
	limited, cancel := context.WithTimeout(ctx, n.waitLimit(room))
	defer cancel()
	// The cursors of Redis mean nothing to another process: members would be missing from
	// the pages that follow. So the process is asked for its identity after each read.
	restart := at.source != "" && !strings.HasPrefix(at.source, ofRedis)
	if restart {
		at = listCursor{}
	}
	for range listAttempts {
		first := at.source == ""
		if first {
			at.source = n.redisSource(limited)
		}
		page, err := n.store.EntriesFrom(limited, room, at.redis, size)
		if err != nil {
			return nil, errorFor(ctx, err)
		}
		if first && !page.More {
			return n.listAnswer(page, "", restart), nil
		}
		id, known := n.hub.Generation(limited, time.Now())
		if known && redisSourceOf(id) == at.source {
			return n.listAnswer(page, at.source, restart), nil
		}
		if !known {
			break
		}
		restart, at = restart || !first, listCursor{}
	}
	return nil, fmt.Errorf("%w: the redis process is unknown", ErrUnavailable)
}

// redisSource returns the source of the cursors of the Redis process that was seen last, or
// "" if it is unknown.
func (n *core) redisSource(ctx context.Context) string {
	id, known := n.hub.Generation(ctx, time.Time{})
	if !known {
		id, known = n.hub.Generation(ctx, time.Now())
	}
	if !known {
		return ""
	}
	return redisSourceOf(id)
}

// listAnswer returns the answer with a page of Redis.
func (n *core) listAnswer(page store.EntryPage, source string, restart bool) wire.Snapshot {
	answer := wire.Snapshot{Success: true, States: make(map[string]json.RawMessage)}
	for _, m := range membersOf(page.Records) {
		answer.Present = append(answer.Present, wire.Member{
			ID: m.ID, UserID: m.UserID, Metadata: m.Metadata, JoinedAt: millisOf(m.JoinedAt), Disconnected: m.Disconnected,
		})
		if m.State != nil {
			answer.States[m.ID] = m.State
		}
	}
	answer.Extent = wire.Extent{Restart: restart, Total: wire.CountOf(page.Total), Epoch: page.Position.Epoch, Seq: page.Position.Seq}
	if n.hub.CountsUsers() && page.Numbers.Users >= 0 {
		answer.Users = wire.CountOf(page.Numbers.Users)
	}
	if page.More {
		answer.Next = listCursor{source: source, redis: page.Next}.String()
	}
	return answer
}

// listCursor is the place from which to continue a list. Clients get its text.
type listCursor struct {
	source string         // the mirrors of a server, or a Redis process; empty: the beginning
	mirror hub.PageCursor // of a server
	redis  store.Cursor   // of a Redis process
}

// ofRedis begins the source of a cursor of Redis. That of a server has no small letters.
const ofRedis = "r"

// redisSourceOf returns the source of the cursors of a Redis process.
func redisSourceOf(id string) string {
	h := fnv.New64a()
	_, _ = h.Write([]byte(id)) // never fails
	return ofRedis + strconv.FormatUint(h.Sum64(), 36)
}

// maxListCursor bounds the text of a cursor. The longest part of it is a connection id.
const maxListCursor = 1024

// String returns the text of a cursor.
func (at listCursor) String() string {
	text := at.source + "." + strconv.FormatUint(at.redis.Scan, 36) + "." + at.redis.After
	if !strings.HasPrefix(at.source, ofRedis) {
		text = at.source + "." + strconv.FormatUint(at.mirror.List, 36) + "." + strconv.Itoa(at.mirror.Left)
	}
	return base64.RawURLEncoding.EncodeToString([]byte(text))
}

// parseListCursor is the inverse of String. The empty text is the zero cursor.
func parseListCursor(text string) (at listCursor, err error) {
	if text == "" {
		return at, nil
	}
	invalid := fmt.Errorf("%w: cursor is not the next of another page", wire.ErrPayload)
	if len(text) > maxListCursor {
		return at, invalid
	}
	data, err := base64.RawURLEncoding.DecodeString(text)
	parts := strings.SplitN(string(data), ".", 3)
	if err != nil || len(parts) != 3 || parts[0] == "" {
		return at, invalid
	}
	number, err := strconv.ParseUint(parts[1], 36, 64)
	if err != nil {
		return at, invalid
	}
	if at.source = parts[0]; strings.HasPrefix(at.source, ofRedis) {
		at.redis = store.Cursor{Scan: number, After: parts[2]}
		return at, nil
	}
	left, err := strconv.Atoi(parts[2])
	if err != nil || left < 1 {
		return listCursor{}, invalid
	}
	at.mirror = hub.PageCursor{List: number, Left: left}
	return at, nil
}
