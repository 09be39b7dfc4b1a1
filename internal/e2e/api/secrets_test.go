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

// output collects the log of a server at every level, and its errors.
type output struct {
	mu   sync.Mutex // guards text
	text bytes.Buffer
}

func (r *output) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.text.Write(p)
}

// logger returns a logger of all levels.
func (r *output) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(r, &slog.HandlerOptions{Level: slog.LevelDebug - 100, AddSource: true}))
}

// take adds an error in several formats, and each error that it wraps.
func (r *output) take(err error) {
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

// TestNoSecretInLogsAndErrors causes every kind of failure between a server and Redis,
// and searches the logs and errors of the server for the password.
func TestNoSecretInLogsAndErrors(t *testing.T) {
	t.Parallel()
	harness.Long(t, "takes real seconds")
	const user, old, other = "mesh-user", "s3cr3t/of=mesh +%&?#é", "an0ther:of@mesh"
	r := redistest.Start(t, redistest.WithTLS(), redistest.WithUser(user+" on nopass resetpass "+harness.AclKeys+" resetchannels "+harness.AclChannels+" "+harness.AclCommands))
	admin := r.Client(t)
	password := func(p string) {
		require.NoError(t, admin.ACLSetUser(t.Context(), user, "resetpass", ">"+p).Err())
	}
	password(old)
	var out output
	for _, c := range []struct {
		name  string
		setup func(o *redis.Options)
		text  string
	}{
		{"wrong password", func(o *redis.Options) { o.Password = other }, "WRONGPASS"},
		{"unknown user", func(o *redis.Options) { o.Username = "nobody" }, "WRONGPASS"},
		{"unknown certificate authority", func(o *redis.Options) { o.TLSConfig = o.TLSConfig.Clone(); o.TLSConfig.RootCAs = nil }, "certificate"},
		{"TLS to a port without it", func(o *redis.Options) { o.Addr = r.Addr() }, ""},
		{"no TLS to a port with it", func(o *redis.Options) { o.TLSConfig = nil }, ""},
		{"no server", func(o *redis.Options) { o.Addr = "127.0.0.1:1" }, "refused"},
		{"no such name", func(o *redis.Options) { o.Addr = "redis.invalid:6379" }, ""},
		{"no right", func(o *redis.Options) { o.DB = 1 }, "NOPERM"},
	} {
		err := func() error {
			srv, err := mesh.NewServer(mesh.Options{Redis: harness.ClientAt(t, r.URL(user, old), r.CAFile(), c.setup), Logger: out.logger()})
			require.NoError(t, err)
			ctx, cancel := context.WithTimeout(t.Context(), 700*time.Millisecond)
			defer cancel()
			err = srv.Start(ctx)
			out.take(srv.Shutdown(t.Context()))
			return err
		}()
		require.ErrorIs(t, err, mesh.ErrUnavailable, c.name)
		require.ErrorContains(t, err, c.text, c.name)
		out.take(err)
	}

	w := &harness.World{T: t, Real: r, As: func() redis.UniversalClient { return harness.ClientAt(t, r.URL(user, old), r.CAFile()) }}
	s := w.Tracked(harness.LeaseOf(time.Second), func(o *mesh.Options) { o.Logger = out.logger() })
	p := s.Dial()
	p.Subscribe("lobby")
	works := func() bool {
		_, err := s.Presence().Count(t.Context(), "lobby")
		out.take(err)
		return err == nil
	}
	// The user is deleted, then its password is changed, and then Redis restarts with
	// another password.
	outage := func(text string, begin, end func()) {
		t.Helper()
		begin()
		w.Eventually(10*time.Second, func() bool { return !works() }, "%s", text)
		short, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		out.take(s.Ready(short))
		cancel()
		_, err := p.TryCall("mesh/join-room", map[string]any{"roomName": "lobby"})
		require.NoError(t, err)
		out.take(s.Connections().SetMetadata(t.Context(), p.ID, 1, mesh.MetadataOptions{}))
		_, err = s.Rooms().All(t.Context())
		out.take(err)
		w.Sleep(1500 * time.Millisecond) // longer than a lease
		end()
		w.Eventually(15*time.Second, works, "after %s", text)
	}
	outage("the user is deleted", func() { require.NoError(t, admin.ACLDelUser(t.Context(), user).Err()) }, func() {
		require.NoError(t, admin.ACLSetUser(t.Context(), user, strings.Fields(harness.AclOf("x"))...).Err())
		password(old)
	})
	outage("the password changes", func() {
		password(other)
		require.NoError(t, admin.ClientKillByFilter(t.Context(), "USER", user).Err())
	}, func() { password(old) })
	outage("Redis restarts with another password", func() { r.Restart(true) }, func() { password(old) })

	for _, c := range []string{other} { // a start that fails
		out.take(errors.Join(harness.TryStart(t, harness.ClientAt(t, r.URL(user, c), r.CAFile()), func(o *mesh.Options) { o.Logger = out.logger() })))
	}
	s.End()
	out.mu.Lock()
	defer out.mu.Unlock()
	text := out.text.String()
	require.Greater(t, strings.Count(text, "\n"), 100)
	require.Contains(t, text, "WRONGPASS")
	for _, secret := range []string{old, other} {
		for _, form := range formsOf(user, secret) {
			require.NotContains(t, text, form)
		}
	}
}

// formsOf returns the forms in which a password may appear.
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
