package mesh

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// manager starts a PresenceManager without WebSockets; it is shut down at the
// end of the test.
func (w *world) manager(setup ...func(*Options)) *PresenceManager {
	w.t.Helper()
	opts := w.options()
	for _, f := range setup {
		f(&opts)
	}
	p, err := NewPresenceManager(opts)
	require.NoError(w.t, err)
	w.t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		if err := p.Shutdown(ctx); err != nil {
			w.t.Errorf("shutdown: %v", err)
		}
	})
	require.NoError(w.t, p.Start(w.t.Context()))
	return p
}

func TestManagerWithAnAppsOwnTransport(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		ctx := t.Context()
		s, p := w.tracked(), w.manager()
		require.NoError(t, p.TrackPresence(Exact("lobby"), PresenceOptions{}))
		watcher := s.dial()
		watcher.subscribe("lobby")

		require.NoError(t, p.Connect(ctx, "sse-1", map[string]string{"name": "Ann"}))
		require.NoError(t, p.Connect(ctx, "sse-2", nil))
		require.ErrorIs(t, p.Connect(ctx, "sse-1", nil), ErrConnectionExists)
		require.NoError(t, p.Join(ctx, "lobby", "sse-1"))
		require.NoError(t, p.Join(ctx, "lobby", "sse-1"), "it is in already")
		require.NoError(t, p.Join(ctx, "lobby", "sse-2"))
		require.JSONEq(t, `{"name":"Ann"}`, string(watcher.expect(2*time.Second, "join", "sse-1").Metadata))
		require.Nil(t, watcher.expect(2*time.Second, "join", "sse-2").Metadata)

		require.NoError(t, p.Connections().SetMetadata(ctx, "sse-2", map[string]string{"name": "Bob"}, MetadataOptions{}))
		require.NoError(t, p.PublishState(ctx, "lobby", "sse-2", map[string]bool{"typing": true}, StateOptions{}))
		require.NoError(t, p.ClearState(ctx, "lobby", "sse-2"))
		watcher.expectStates(2*time.Second, "sse-2", `{"typing":true}`, "null")
		members, err := s.Presence().Members(ctx, "lobby")
		require.NoError(t, err)
		require.Len(t, members, 2)

		was, err := p.Leave(ctx, "lobby", "sse-1")
		require.NoError(t, err)
		require.True(t, was)
		was, err = p.Leave(ctx, "lobby", "sse-1")
		require.NoError(t, err)
		require.False(t, was)
		watcher.expect(2*time.Second, "leave", "sse-1")
		require.NoError(t, p.Disconnect(ctx, "sse-2"))
		require.Empty(t, s.present("lobby"), "Disconnect returns when Redis has it")
		watcher.expect(2*time.Second, "leave", "sse-2")
		require.ErrorIs(t, p.Disconnect(ctx, "sse-2"), ErrUnknownConnection)

		// The id is free again, at once.
		require.NoError(t, p.Connect(ctx, "sse-2", nil))
		require.NoError(t, p.Join(ctx, "lobby", "sse-2"))
		w.eventually(2*time.Second, func() bool { return watcher.count("join", "sse-2") == 2 }, "it is back")
		require.Equal(t, 1, watcher.count("join", "sse-1"))
		require.Equal(t, 2, watcher.count("leave", ""))
	})
}

func TestManagerRefusesWhatMakesNoSense(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		ctx := t.Context()
		fresh, err := NewPresenceManager(Options{Redis: w.client()})
		require.NoError(t, err)
		require.NoError(t, fresh.TrackPresence(Exact("lobby"), PresenceOptions{}), "rules may come first")
		require.ErrorIs(t, fresh.Ready(ctx), ErrNotStarted)
		require.ErrorIs(t, fresh.Connect(ctx, "c", nil), ErrNotStarted)
		require.ErrorIs(t, fresh.Join(ctx, "lobby", "c"), ErrNotStarted)
		_, err = fresh.Count(ctx, "lobby")
		require.ErrorIs(t, err, ErrNotStarted)
		require.NoError(t, fresh.Shutdown(ctx))
		require.ErrorIs(t, fresh.Start(ctx), ErrClosed)

		p := w.manager()
		require.NoError(t, p.Start(ctx), "a second time does nothing")
		require.NoError(t, p.Ready(ctx))
		require.NoError(t, p.TrackPresence(Exact("closed"), PresenceOptions{
			JoinGuard: func(context.Context, Member, string) (bool, error) { return false, nil },
		}))
		for _, id := range []string{"", "a:b", "a b", "a\nb", "\xff", strings.Repeat("x", 129)} {
			require.ErrorIs(t, p.Connect(ctx, id, nil), ErrInvalidConnectionID, "%q", id)
			require.ErrorIs(t, p.Join(ctx, "lobby", id), ErrInvalidConnectionID, "%q", id)
			require.ErrorIs(t, p.Touch(id), ErrInvalidConnectionID, "%q", id)
		}
		require.ErrorIs(t, p.Connect(ctx, "c", func() {}), ErrInvalidMetadata)
		require.ErrorIs(t, p.Touch("c"), ErrUnknownConnection)
		require.NoError(t, p.Connect(ctx, "c", nil))
		require.ErrorIs(t, p.Join(ctx, "", "c"), ErrInvalidRoom)
		require.ErrorIs(t, p.Join(ctx, "closed", "c"), ErrRefused)
		_, err = p.Leave(ctx, "lobby", "nobody")
		require.ErrorIs(t, err, ErrUnknownConnection)

		require.NoError(t, p.Shutdown(ctx))
		require.NoError(t, p.Shutdown(ctx), "again")
		require.ErrorIs(t, p.Ready(ctx), ErrClosed)
		require.ErrorIs(t, p.Connect(ctx, "d", nil), ErrClosed)
		require.ErrorIs(t, p.Join(ctx, "lobby", "c"), ErrClosed)
	})
}

func TestMissingTouchesEndAnEntry(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		const ttl = time.Second
		ctx := t.Context()
		s, p := w.server(), w.manager()
		s.track(".*", PresenceOptions{TTL: ttl})
		require.NoError(t, p.TrackPresence(Regexp(mustCompile(".*")), PresenceOptions{TTL: ttl}))
		watcher := s.dial()
		watcher.subscribe("lobby")
		for _, id := range []string{"busy", "silent", "gone"} {
			require.NoError(t, p.Connect(ctx, id, nil))
			require.NoError(t, p.Join(ctx, "lobby", id))
		}
		last := time.Now()
		for time.Since(last) < 2*ttl {
			require.NoError(t, p.Touch("busy"))
			w.sleep(200 * time.Millisecond)
		}
		for _, id := range []string{"silent", "gone"} {
			u := watcher.expect(0, "leave", id)
			require.WithinRange(t, time.UnixMilli(u.Timestamp), last.Add(ttl-100*time.Millisecond), last.Add(ttl+time.Second))
		}
		require.Equal(t, []string{"busy"}, s.present("lobby"))
		_, err := p.Leave(ctx, "lobby", "gone") // out for good
		require.NoError(t, err)
		for range 3 {
			for _, id := range []string{"busy", "silent", "gone"} {
				require.NoError(t, p.Touch(id))
			}
			w.sleep(200 * time.Millisecond)
		}
		require.Equal(t, 2, watcher.count("join", "silent"), "the next sign of life joins it again")
		require.ElementsMatch(t, []string{"busy", "silent"}, s.present("lobby"))
		require.Equal(t, 1, watcher.count("leave", "silent"))
		require.Equal(t, watcher.count("join", "gone"), watcher.count("leave", "gone"))
		require.Equal(t, 1, watcher.count("join", "busy"))
		require.Equal(t, 0, watcher.count("leave", "busy"))
	})
}

// A wish to leave joins nobody again, not even for a moment.
func TestLeaveOfAnExpiredEntryIsToldNobody(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		ctx := t.Context()
		s, p := w.server(), w.manager()
		s.track(".*", PresenceOptions{TTL: time.Second})
		require.NoError(t, p.TrackPresence(Regexp(mustCompile(".*")), PresenceOptions{TTL: time.Second}))
		watcher := s.dial()
		watcher.subscribe("lobby")
		require.NoError(t, p.Connect(ctx, "c", nil))
		require.NoError(t, p.Join(ctx, "lobby", "c"))
		require.NoError(t, p.Join(ctx, "other", "c"))
		watcher.expect(3*time.Second, "leave", "c")
		_, err := p.Leave(ctx, "lobby", "c")
		require.NoError(t, err)
		w.eventually(2*time.Second, func() bool { return len(s.present("other")) == 1 }, "it is a sign of life for other rooms")
		w.sleep(200 * time.Millisecond)
		require.Equal(t, 1, watcher.count("join", "c"), "%v", watcher.got())
		require.Equal(t, 1, watcher.count("leave", "c"))
		require.Empty(t, s.present("lobby"))
	})
}

func TestShutdownLetsEverybodyLeave(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		ctx := t.Context()
		s, p := w.tracked(), w.manager()
		require.NoError(t, p.TrackPresence(Regexp(mustCompile(".*")), PresenceOptions{}))
		watcher := s.dial()
		watcher.subscribe("lobby")
		for _, id := range []string{"a", "b", "c"} {
			require.NoError(t, p.Connect(ctx, id, nil))
			require.NoError(t, p.Join(ctx, "lobby", id))
			require.NoError(t, p.PublishState(ctx, "lobby", id, map[string]int{"n": 1}, StateOptions{}))
		}
		require.NoError(t, p.Shutdown(ctx))
		require.Empty(t, s.present("lobby"), "Shutdown returns when Redis has it")
		for _, id := range []string{"a", "b", "c"} {
			watcher.expect(2*time.Second, "leave", id)
			watcher.expectStates(0, id, `{"n":1}`)
		}
		require.Equal(t, 3, watcher.count("leave", ""))
	})
}

// What was asked for while Redis was away is made true when it is back.
func TestManagerWithoutRedis(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		ctx := t.Context()
		s, p := w.tracked(), w.manager()
		require.NoError(t, p.TrackPresence(Regexp(mustCompile(".*")), PresenceOptions{}))
		watcher := s.dial()
		watcher.subscribe("lobby")
		for _, id := range []string{"stays", "comes", "goes"} {
			require.NoError(t, p.Connect(ctx, id, nil))
		}
		for _, id := range []string{"stays", "goes"} {
			require.NoError(t, p.Join(ctx, "lobby", id))
			watcher.expect(time.Second, "join", id)
		}
		w.away()
		for name, do := range map[string]func() error{
			"join":  func() error { return p.Join(ctx, "lobby", "comes") },
			"leave": func() error { _, err := p.Leave(ctx, "lobby", "goes"); return err },
			"state": func() error {
				return p.PublishState(ctx, "lobby", "stays", map[string]int{"n": 1}, StateOptions{})
			},
			"members": func() error { _, err := p.Members(ctx, "lobby"); return err },
			"count":   func() error { _, err := p.Count(ctx, "lobby"); return err },
		} {
			began := time.Now()
			require.ErrorIs(t, do(), ErrUnavailable, name)
			require.LessOrEqual(t, time.Since(began), 2*time.Second, name)
		}
		require.Len(t, watcher.got(), 2)
		w.back()
		watcher.expect(3*time.Second, "join", "comes")
		watcher.expect(3*time.Second, "leave", "goes")
		watcher.expectStates(3*time.Second, "stays", `{"n":1}`)
		w.sleep(20 * time.Second)
		require.Len(t, watcher.got(), 5, "%v", watcher.got())
		require.ElementsMatch(t, []string{"stays", "comes"}, s.present("lobby"))
	})
}
