package api

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/redistest"
	"github.com/meshpresence/mesh/internal/testhook"
)

// record is all that a server says: its log at every level, and its errors.
type record struct {
	mu   sync.Mutex // guards text
	text bytes.Buffer
}

func (r *record) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.text.Write(p)
}

// logger logs everything.
func (r *record) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(r, &slog.HandlerOptions{Level: slog.LevelDebug - 100, AddSource: true}))
}

// take notes an error as people print them, and each that it wraps.
func (r *record) take(err error) {
	if err == nil {
		return
	}
	message, code, name := testhook.WireError(err)
	_, _ = fmt.Fprintf(r, "%v\n%+v\n%#v\n%q\n%s %s %s\n", err, err, err, err, message, code, name)
	switch e := err.(type) {
	case interface{ Unwrap() error }:
		r.take(e.Unwrap())
	case interface{ Unwrap() []error }:
		for _, inner := range e.Unwrap() {
			r.take(inner)
		}
	}
}

// TestNothingSaidHoldsASecret drives whatever can go wrong between a server and
// its Redis, and looks for the password in all that the server says of it.
func TestNothingSaidHoldsASecret(t *testing.T) {
	t.Parallel()
	harness.Long(t, "takes real seconds")
	const user, old, other = "mesh-user", "s3cr3t/of=mesh +%&?#é", "an0ther:of@mesh"
	r := redistest.Start(t, redistest.WithTLS(), redistest.WithUser(user+" on nopass resetpass "+harness.AclKeys+" resetchannels "+harness.AclChannels+" "+harness.AclCommands))
	admin := r.Client(t)
	password := func(p string) {
		require.NoError(t, admin.ACLSetUser(t.Context(), user, "resetpass", ">"+p).Err())
	}
	password(old)
	var said record
	for _, c := range []struct {
		name  string
		setup func(o *redis.Options)
		says  string
	}{
		{"wrong password", func(o *redis.Options) { o.Password = other }, "WRONGPASS"},
		{"unknown user", func(o *redis.Options) { o.Username = "nobody" }, "WRONGPASS"},
		{"who signed it is unknown", func(o *redis.Options) { o.TLSConfig = o.TLSConfig.Clone(); o.TLSConfig.RootCAs = nil }, "certificate"},
		{"TLS where there is none", func(o *redis.Options) { o.Addr = r.Addr() }, ""},
		{"no TLS where there is", func(o *redis.Options) { o.TLSConfig = nil }, ""},
		{"nobody there", func(o *redis.Options) { o.Addr = "127.0.0.1:1" }, "refused"},
		{"no such name", func(o *redis.Options) { o.Addr = "redis.invalid:6379" }, ""},
		{"no right", func(o *redis.Options) { o.DB = 1 }, "NOPERM"},
	} {
		err := func() error {
			srv, err := mesh.NewServer(mesh.Options{Redis: harness.ClientAt(t, r.URL(user, old), r.CAFile(), c.setup), Logger: said.logger()})
			require.NoError(t, err)
			ctx, cancel := context.WithTimeout(t.Context(), 700*time.Millisecond)
			defer cancel()
			err = srv.Start(ctx)
			said.take(srv.Shutdown(t.Context()))
			return err
		}()
		require.ErrorIs(t, err, mesh.ErrUnavailable, c.name)
		require.ErrorContains(t, err, c.says, c.name)
		said.take(err)
	}

	w := &harness.World{T: t, Real: r, As: func() redis.UniversalClient { return harness.ClientAt(t, r.URL(user, old), r.CAFile()) }}
	s := w.Tracked(harness.LeaseOf(time.Second), func(o *mesh.Options) { o.Logger = said.logger() })
	p := s.Dial()
	p.Subscribe("lobby")
	works := func() bool {
		_, err := s.Presence().Count(t.Context(), "lobby")
		said.take(err)
		return err == nil
	}
	// Somebody takes the user away, then gives it another password, then the
	// old one again; and Redis restarts with a user who has another.
	away := func(what string, begin, end func()) {
		t.Helper()
		begin()
		w.Eventually(10*time.Second, func() bool { return !works() }, "%s", what)
		short, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		said.take(s.Ready(short))
		cancel()
		_, err := p.TryCall("mesh/join-room", map[string]any{"roomName": "lobby"})
		require.NoError(t, err)
		said.take(s.Connections().SetMetadata(t.Context(), p.ID, 1, mesh.MetadataOptions{}))
		_, err = s.Rooms().All(t.Context())
		said.take(err)
		w.Sleep(1500 * time.Millisecond) // longer than a lease
		end()
		w.Eventually(15*time.Second, works, "after %s", what)
	}
	away("the user is deleted", func() { require.NoError(t, admin.ACLDelUser(t.Context(), user).Err()) }, func() {
		require.NoError(t, admin.ACLSetUser(t.Context(), user, strings.Fields(harness.AclOf("x"))...).Err())
		password(old)
	})
	away("the password changes", func() {
		password(other)
		require.NoError(t, admin.ClientKillByFilter(t.Context(), "USER", user).Err())
	}, func() { password(old) })
	away("Redis restarts with another password", func() { r.Restart(true) }, func() { password(old) })

	for _, c := range []string{other} { // and an app that watches while all fails
		said.take(errors.Join(harness.TryStart(t, harness.ClientAt(t, r.URL(user, c), r.CAFile()), func(o *mesh.Options) { o.Logger = said.logger() })))
	}
	s.End()
	said.mu.Lock()
	defer said.mu.Unlock()
	text := said.text.String()
	require.Greater(t, strings.Count(text, "\n"), 100)
	require.Contains(t, text, "WRONGPASS")
	for _, secret := range []string{old, other} {
		for _, form := range formsOf(user, secret) {
			require.NotContains(t, text, form)
		}
	}
}

// formsOf are the forms that a password takes on its way.
func formsOf(user, secret string) []string {
	forms := []string{
		secret, url.QueryEscape(secret), url.PathEscape(secret), url.UserPassword(user, secret).String(),
		strings.Trim(fmt.Sprintf("%q", secret), `"`), fmt.Sprintf("%x", secret), fmt.Sprint([]byte(secret)), secret[:8],
	}
	for _, e := range []*base64.Encoding{base64.StdEncoding, base64.URLEncoding, base64.RawStdEncoding, base64.RawURLEncoding} {
		forms = append(forms, e.EncodeToString([]byte(secret)), e.EncodeToString([]byte(user+":"+secret)))
	}
	return forms
}
