package mesh_test

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
)

// A field of the metadata is a user only if no two people can have the same one, and no
// client can choose another one.
func TestUserIDField(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		var log bytes.Buffer
		p := w.Manager(func(o *mesh.Options) {
			o.UserID = mesh.UserIDField("userId")
			o.Logger = slog.New(slog.NewTextHandler(&log, nil))
		})
		require.NoError(t, p.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{}))
		invalid := uint64(0)
		for _, c := range []struct {
			metadata, user string
			invalid        bool
		}{
			{`{"userId":"ann"}`, "ann", false},
			{`{"userId":7}`, "7", false},
			{`{"userId":"7"}`, "7", false},
			{`{"userId":9007199254740993}`, "9007199254740993", false},
			{`{"userId":-1}`, "-1", false},
			{`{"USERID":"eve","userId":"ann"}`, "ann", false},
			{`{"userId":"` + strings.Repeat("u", 128) + `"}`, strings.Repeat("u", 128), false},
			{`{"userId":null}`, "", false},
			{`{"name":"Ann"}`, "", false},
			{`["userId"]`, "", false},
			{`null`, "", false},
			{`{"userId":""}`, "", true},
			{`{"userId":1.0}`, "", true},
			{`{"userId":1e3}`, "", true},
			{`{"userId":true}`, "", true},
			{`{"userId":{"id":"ann"}}`, "", true},
			{`{"userId":"ann","userId":"eve"}`, "", true},
			{`{"userId":"a\u0000b"}`, "", true},
			{`{"userId":"\ud800"}`, "", true},
			{`{"userId":"` + strings.Repeat("u", 129) + `"}`, "", true},
		} {
			require.NoError(t, p.Connect(t.Context(), "c", json.RawMessage(c.metadata)))
			require.NoError(t, p.Join(t.Context(), "lobby", "c"))
			members, err := p.Members(t.Context(), "lobby")
			require.NoError(t, err)
			require.Len(t, members, 1)
			assert.Equal(t, c.user, members[0].UserID, c.metadata)
			if c.invalid {
				invalid++
			}
			assert.Equal(t, invalid, p.Stats().InvalidUserIDs, c.metadata)
			require.NoError(t, p.Disconnect(t.Context(), "c"))
			w.Sleep(time.Second)
		}
		assert.Contains(t, log.String(), "Options.UserID returned no valid id")
		assert.NotContains(t, log.String(), "uuuu", "no ids")
	})
}

// A function of the app that panics gives the connection no user, and hurts nothing else.
func TestUserIDPanics(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		p := w.Manager(func(o *mesh.Options) { o.UserID = func(mesh.Member) string { panic("no user today") } })
		require.NoError(t, p.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{Grace: time.Second, MaxUsers: 1}))
		require.NoError(t, p.Connect(t.Context(), "c", nil))
		require.NoError(t, p.Join(t.Context(), "lobby", "c"))
		members, err := p.Members(t.Context(), "lobby")
		require.NoError(t, err)
		assert.Empty(t, members[0].UserID)
		assert.EqualValues(t, 1, p.Stats().InvalidUserIDs)
	})
}

// Settings about users need users, and have bounds.
func TestSettingsOfUsers(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		without, with := w.Manager(), w.Manager(harness.WithUsers)
		for field, rule := range map[string]mesh.PresenceOptions{
			"Grace requires Options.UserID": {Grace: time.Second}, "MaxUsers requires Options.UserID": {MaxUsers: 1},
		} {
			err := without.TrackPresence(mesh.Exact("lobby"), rule)
			require.ErrorIs(t, err, mesh.ErrInvalidOptions)
			require.ErrorContains(t, err, field)
			require.NoError(t, with.TrackPresence(mesh.Exact("lobby"), rule))
		}
		require.NoError(t, without.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{MaxConnections: 1}))
		for _, rule := range []mesh.PresenceOptions{
			{Grace: time.Millisecond}, {Grace: 11 * time.Minute}, {Grace: -1}, {MaxUsers: -1}, {MaxConnections: -1}, {MaxUsers: 1<<30 + 1},
		} {
			require.ErrorIs(t, with.TrackPresence(mesh.Exact("lobby"), rule), mesh.ErrInvalidOptions, "%+v", rule)
		}
		_, err := without.Users(t.Context(), "lobby")
		require.ErrorIs(t, err, mesh.ErrUsersOff)
		_, err = without.Rooms().RemoveUser(t.Context(), "lobby", "ann")
		require.ErrorIs(t, err, mesh.ErrUsersOff)
		for _, user := range []string{"", "a\nb", strings.Repeat("u", 129), "\xff", "\ufffd"} {
			_, err = with.Rooms().RemoveUser(t.Context(), "lobby", user)
			require.ErrorIs(t, err, mesh.ErrInvalidUser, "%q", user)
		}
	})
}
