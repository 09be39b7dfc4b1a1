package meshdebug_test

import (
	"net/http"
	"net/url"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/meshdebug"
)

// A connection is found by its id, on any server and from any server.
func TestConnectionIsFound(t *testing.T) {
	t.Parallel()
	inVirtualTime(t, func(r *rig) {
		r.start()
		p, _ := r.second()
		other := meshdebug.NewHandler(p, meshdebug.Options{})
		r.member(p, "lobby", "ann", map[string]any{"name": "Ann"}, map[string]any{"typing": true})
		require.NoError(r.t, p.Join(r.t.Context(), "attic", "ann"))
		for _, h := range []http.Handler{r.h, other} {
			asked := &rig{t: r.t, h: h}
			c := asked.data("conn=ann", http.StatusOK).Connection
			require.NotNil(r.t, c.Known)
			assert.True(r.t, *c.Known)
			assert.Equal(r.t, "ann", c.ID)
			assert.Equal(r.t, p.Stats().Incarnation, c.Server)
			assert.Equal(r.t, "web-<2>", c.ServerName)
			assert.Equal(r.t, "living", c.ServerState)
			assert.Equal(r.t, h == other, c.Self)
			assert.JSONEq(r.t, `{"name":"Ann"}`, string(c.Metadata))
			require.Len(r.t, c.Rooms, 2)
			assert.Equal(r.t, "attic", c.Rooms[0].Name)
			assert.Nil(r.t, c.Rooms[0].Entry.State)
			assert.Equal(r.t, "lobby", c.Rooms[1].Name)
			assert.JSONEq(r.t, `{"typing":true}`, string(c.Rooms[1].Entry.State))
			assert.Equal(r.t, "web-<2>", c.Rooms[1].Entry.ServerName)

			body := asked.get("/?conn=%20ann%0a").Body.String() // as a user pastes it
			for _, want := range []string{"<bdi>web-&lt;2&gt;</bdi>", `{&#34;typing&#34;:true}`, `{&#34;name&#34;:&#34;Ann&#34;}`} {
				assert.Contains(r.t, body, want)
			}
			assert.Contains(r.t, links(body), "?room=lobby")
		}
		hidden := &rig{t: r.t, h: meshdebug.NewHandler(r.srv, meshdebug.Options{HideData: true})}
		c := hidden.data("conn=ann", http.StatusOK).Connection
		assert.True(r.t, c.Hidden)
		assert.Nil(r.t, c.Metadata)
		require.Len(r.t, c.Rooms, 2)
		assert.Nil(r.t, c.Rooms[1].Entry.State)
		body := hidden.get("/?conn=ann").Body.String()
		assert.NotContains(r.t, body, "typing")
		assert.NotContains(r.t, body, "Ann")
		assert.Contains(r.t, links(r.get("/?room=lobby").Body.String()), "?conn=ann", "a room's page leads to its connections")

		require.NoError(r.t, p.Disconnect(r.t.Context(), "ann"))
		for _, id := range []string{"ann", "nobody"} {
			c := r.data("conn="+id, http.StatusNotFound).Connection
			require.NotNil(r.t, c.Known)
			assert.False(r.t, *c.Known)
			assert.Contains(r.t, r.get("/?conn="+id).Body.String(), "No server has")
		}
	})
}

// If Redis does not answer, the page says so and shows the data of this server.
func TestConnectionWhileRedisIsAway(t *testing.T) {
	t.Parallel()
	inVirtualTime(t, func(r *rig) {
		r.start()
		p, _ := r.second()
		r.member(r.srv.Presence(), "lobby", "ann", map[string]any{"name": "Ann"}, nil)
		r.member(p, "lobby", "bob", nil, nil)
		r.mem.Hang()
		began := time.Now()
		c := r.data("conn=ann", http.StatusServiceUnavailable).Connection
		require.NotNil(r.t, c.Known)
		assert.True(r.t, *c.Known, "it is on this server")
		assert.True(r.t, c.Self)
		assert.JSONEq(r.t, `{"name":"Ann"}`, string(c.Metadata))
		require.Len(r.t, c.Rooms, 1)
		assert.Equal(r.t, "lobby", c.Rooms[0].Name)
		assert.Nil(r.t, c.Rooms[0].Entry)
		assert.NotEmpty(r.t, c.Error)
		c = r.data("conn=bob", http.StatusServiceUnavailable).Connection
		assert.Nil(r.t, c.Known)
		assert.NotEmpty(r.t, c.Error)
		body := r.get("/?conn=bob").Body.String()
		assert.Contains(r.t, body, "Redis does not answer")
		assert.Contains(r.t, body, "not known")
		assert.LessOrEqual(r.t, time.Since(began), 3*2*time.Second, "two seconds each")
		r.mem.Resume()
	})
}

// If the server of the connection has died or does not answer, the page shows the data of
// Redis and says that the rooms are not known.
func TestConnectionOfAServerThatDied(t *testing.T) {
	t.Parallel()
	inVirtualTime(t, func(r *rig) {
		r.start()
		p, die := r.second()
		r.member(p, "lobby", "bob", map[string]any{"name": "Bob"}, nil)
		die()
		c := r.data("conn=bob", http.StatusServiceUnavailable).Connection
		require.NotNil(r.t, c.Known)
		assert.True(r.t, *c.Known)
		assert.Equal(r.t, p.Stats().Incarnation, c.Server)
		assert.Equal(r.t, "web-<2>", c.ServerName)
		assert.JSONEq(r.t, `{"name":"Bob"}`, string(c.Metadata))
		assert.Empty(r.t, c.Rooms)
		body := r.get("/?conn=bob").Body.String()
		assert.Contains(r.t, body, "The server of this connection does not answer")
		time.Sleep(15 * time.Second)
		r.data("conn=bob", http.StatusNotFound)
	})
}

// Hostile ids and data of a connection are shown as plain text.
func TestHostileConnections(t *testing.T) {
	t.Parallel()
	inVirtualTime(t, func(r *rig) {
		r.trackAll()
		r.start()
		p := r.srv.Presence()
		require.NoError(r.t, p.Connect(r.t.Context(), "harmless", nil))
		require.NoError(r.t, p.Join(r.t.Context(), "harmless", "harmless"))
		good := elementsWithout(r.get("/?conn=harmless").Body.String())
		tested := 0
		for _, name := range hostile {
			if p.Connect(r.t.Context(), name, nil) != nil {
				continue // no connection can have that id
			}
			tested++
			require.NoError(r.t, p.Join(r.t.Context(), name, name))
			w := r.get("/?conn=" + url.QueryEscape(name))
			require.Equal(r.t, http.StatusOK, w.Code, "%q", name)
			assert.Equal(r.t, good, elementsWithout(w.Body.String()), "%q", name)
			r.escaped(w.Body.String(), name)
			assert.Equal(r.t, name, r.data("conn="+url.QueryEscape(name), http.StatusOK).Connection.ID)
		}
		assert.Greater(r.t, tested, 10)
	})
}

// If the value in Redis is not a valid name, because a server of another version or a
// person wrote it, no name is shown.
func TestServerNames(t *testing.T) {
	t.Parallel()
	inVirtualTime(t, func(r *rig) {
		r.start()
		p, _ := r.second()
		names := func() map[string]string {
			found := make(map[string]string)
			for _, s := range r.data("", http.StatusOK).Servers.List {
				found[s.Incarnation] = s.Name
			}
			return found
		}
		self, other := r.srv.Stats().Incarnation, p.Stats().Incarnation
		require.Equal(r.t, map[string]string{self: "web-1", other: "web-<2>"}, names())
		body := r.get("/").Body.String()
		assert.Contains(r.t, body, "<bdi>web-1</bdi>")
		assert.Contains(r.t, body, "<bdi>web-&lt;2&gt;</bdi>")
		require.NoError(r.t, r.client().Set(r.t.Context(), "mesh:server-name:"+other, "a\nb", 0).Err())
		require.Equal(r.t, map[string]string{self: "web-1", other: ""}, names())
	})
}

// The Source of a handler may be a server that was not started.
func TestConnectionOfAServerThatIsNotStarted(t *testing.T) {
	t.Parallel()
	inVirtualTime(t, func(r *rig) {
		c := r.data("conn=ann", http.StatusServiceUnavailable).Connection
		assert.Nil(r.t, c.Known)
		assert.Contains(r.t, c.Error, mesh.ErrNotStarted.Error())
		assert.Contains(r.t, r.get("/?conn=ann").Body.String(), "has not been started")
	})
}
