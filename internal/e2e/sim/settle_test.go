package sim

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/hub"
	"github.com/meshpresence/mesh/internal/testhook"
)

// settle ends all faults and waits for the recovery, no longer than promised. With
// last, it always waits for the whole time. Then it compares everything with the truth.
func (s *sim) settle(last bool) {
	s.mu.Lock()
	for len(s.later) > 0 {
		s.undo(s.later[0])
	}
	s.noted("faults end")
	s.mu.Unlock()
	began := time.Now()
	earliest := began.Add(s.lease + s.ttl + 3*time.Second)
	var wrong time.Duration // time until the last difference
	for !s.failed() {
		s.step(100 * time.Millisecond)
		s.mu.Lock()
		now := time.Now()
		if s.anyDiffers(now) {
			wrong = now.Sub(began)
		}
		done := now.After(earliest) && (now.After(s.disturbed) || !last && now.Sub(began) > wrong+3*time.Second)
		s.mu.Unlock()
		if done {
			break
		}
	}
	s.mu.Lock()
	due := last || time.Now().After(s.disturbed)
	s.mu.Unlock()
	if due {
		s.compare()
	}
	if !s.failed() && len(s.phase) == 1 {
		s.recovered[s.phase[0]] = append(s.recovered[s.phase[0]], wrong)
	}
	s.phase = nil
}

// anyDiffers reports whether a subscriber lacks a change that is some time old. s.mu is
// held.
func (s *sim) anyDiffers(now time.Time) bool {
	return slices.ContainsFunc(s.streams, func(st *simStream) bool {
		return !st.over && !st.server.dead && (!st.live || st.differs(now, 400*time.Millisecond) != "")
	})
}

// checkDue checks that due updates have arrived, unless a fault prevented them. s.mu is
// held.
func (s *sim) checkDue(now time.Time) {
	late := func(list []simDue, present bool) []simDue {
		return slices.DeleteFunc(list, func(d simDue) bool {
			bound := 1250 * time.Millisecond
			if c := s.clients[d.k.conn]; c.server.dead {
				bound += s.lease
			}
			if now.Before(d.from.Add(bound)) {
				return false
			}
			if s.active > 0 || d.from.Before(s.disturbed) {
				return true
			}
			f := s.fact(d.k, now)
			if f.present != present || now.Sub(f.since) < bound {
				return true
			}
			for _, st := range s.streams {
				if _, seen := st.seen[d.k.conn]; st.room == d.k.room && st.live && !st.over && !st.server.dead && seen != present {
					st.fail("late: %s is present=%v since %v", d.k.conn, present, f.since.Sub(s.start))
				}
			}
			return true
		})
	}
	s.leavesDue = late(s.leavesDue, false)
	s.joinsDue = late(s.joinsDue, true)
	for _, e := range s.entries { // a reason ends when its leave was due long ago
		for _, t := range e.reasons {
			if t.until.IsZero() && s.active == 0 && now.After(s.disturbed) && now.Sub(t.from) > s.lease+5*time.Second {
				t.until = now
			}
		}
	}
}

// compare checks that all subscribers, mirrors and Redis have the truth, when no fault
// is left.
func (s *sim) compare() {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	if s.failure != "" {
		return
	}
	for _, st := range s.streams {
		if st.over || st.server.dead {
			continue
		}
		if !st.live {
			st.fail("has no snapshot since %v", st.began.Sub(s.start))
			continue
		}
		if diff := st.differs(now, 0); diff != "" {
			st.fail("%s", diff)
		}
		if v, ok := testhook.PartsOf(st.server.p).Hub.View(st.room); ok {
			s.compareMembers("mirror on "+st.server.name, st.room, mirrored(v), now)
		} else {
			st.fail("the mirror is not up to date")
		}
	}
	s.users.compare()
	for _, n := range s.living() {
		for _, room := range s.rooms {
			var members []mesh.Member
			var err error
			s.unlocked(func() { members, err = n.p.Members(s.ctx, room) })
			if err != nil {
				s.fail("members of %s on %s: %v", room, n.name, err)
				return
			}
			s.compareMembers("Redis", room, members, now)
		}
		for tries := 0; testhook.PartsOf(n.p).Local.Stats().Unwritten > 0; tries++ { // may be a refresh
			if tries == 20 {
				s.fail("%s has unwritten changes", n.name)
				break
			}
			s.unlocked(func() { time.Sleep(10 * time.Millisecond) })
		}
	}
}

// unlocked calls a function that takes time, without holding s.mu. Otherwise a
// subscriber with an event would wait for s.mu, and virtual time would stand still.
// Clients continue to show life. s.mu is held before and after.
func (s *sim) unlocked(do func()) {
	s.mu.Unlock()
	do()
	s.mu.Lock()
	s.showLife(time.Now())
}

// mirrored returns the members of a mirror.
func mirrored(v hub.View) []mesh.Member {
	var members []mesh.Member
	for _, m := range v.Members() {
		members = append(members, mesh.Member{ID: m.Conn, Metadata: m.Meta(), State: m.State})
	}
	return members
}

func (s *sim) compareMembers(where, room string, members []mesh.Member, now time.Time) {
	got := make(map[string]mesh.Member, len(members))
	for _, m := range members {
		got[m.ID] = m
		if s.clients[m.ID] == nil {
			s.fail("%s, %s: unknown %s", where, room, m.ID)
		}
	}
	for id, c := range s.clients {
		f := s.fact(simKey{room, id}, now)
		m, present := got[id]
		switch {
		case present != f.present:
			s.fail("%s, %s: %s present=%v, should be %v since %v", where, room, id, present, f.present, f.since.Sub(s.start))
		case present && !f.has(string(m.State)):
			s.fail("%s, %s: %s has state %s, should be %s", where, room, id, m.State, f.state)
		case present && c.metaBad && !c.metas[string(m.Metadata)], present && !c.metaBad && string(m.Metadata) != c.meta:
			s.fail("%s, %s: %s has metadata %s, should be %s", where, room, id, m.Metadata, c.meta)
		}
	}
}

// leaveAll disconnects all clients and shuts the servers down. Then it checks the keys
// that are left in Redis.
func (s *sim) leaveAll() {
	s.mu.Lock()
	for _, c := range s.list() {
		s.disconnect(c)
	}
	s.users.leave()
	servers := s.living()
	for _, st := range s.streams {
		st.over = true
		st.cancel()
	}
	s.mu.Unlock()
	time.Sleep(3 * time.Second)
	for _, n := range servers {
		ctx, cancel := context.WithTimeout(s.ctx, 30*time.Second)
		if err := n.p.Shutdown(ctx); err != nil {
			s.mu.Lock()
			s.fail("shutdown of %s: %v", n.name, err)
			s.mu.Unlock()
		}
		cancel()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, key := range s.admin.Keys(s.ctx, "*").Val() {
		left := s.admin.PTTL(s.ctx, key).Val()
		if key == "mesh:format" || left != -1 {
			s.checkKept(key, left)
			continue
		}
		var content string
		switch {
		case strings.Contains(key, "owned"):
			content = fmt.Sprint(s.admin.SMembers(s.ctx, key).Val())
		case strings.Contains(key, "instances"), strings.Contains(key, "dead"):
			content = fmt.Sprint(s.admin.ZRangeWithScores(s.ctx, key, 0, -1).Val())
		default:
			content = fmt.Sprint(s.admin.HGetAll(s.ctx, key).Val())
		}
		s.fail("left in Redis: %s %s", key, content)
	}
}

// checkKept checks how long the position of an empty room is kept: an hour if the room
// was in use for longer than a minute, otherwise 15 s. All rooms are tracked. The time
// of the last write follows from the TTL of the key. A rollback of Redis changes it by
// a few seconds. s.mu is held.
func (s *sim) checkKept(key string, left time.Duration) {
	if !strings.Contains(key, "presence:seq:") || left <= 0 || !s.stepped.IsZero() {
		return
	}
	const visited, rolledBack = 15 * time.Second, 10 * time.Second
	epoch, _, _ := strings.Cut(s.admin.Get(s.ctx, key).Val(), " ")
	_, text, timed := strings.Cut(epoch, "@")
	ms, err := strconv.ParseInt(text, 10, 64)
	if !timed || err != nil {
		s.fail("%s: the epoch %q has no time", key, epoch)
		return
	}
	kept := time.Hour
	if left <= visited {
		kept = visited
	}
	used := s.admin.Time(s.ctx).Val().Add(left - kept).Sub(time.UnixMilli(ms))
	if kept == visited && used > time.Minute+rolledBack || kept != visited && used < time.Minute-rolledBack {
		s.fail("%s was in use for %v and is kept for another %v", key, used, left)
	}
}
