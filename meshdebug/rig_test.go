package meshdebug_test

import (
	"context"
	"encoding/json"
	"html"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/redistest"
	"github.com/meshpresence/mesh/meshdebug"
	"github.com/meshpresence/mesh/meshtest"
)

// rig is a Redis and a server with the handler, in virtual time.
type rig struct {
	t   *testing.T
	mem *meshtest.Redis
	srv *mesh.Server
	h   http.Handler
}

func inVirtualTime(t *testing.T, f func(r *rig)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		r := &rig{t: t, mem: meshtest.StartRedis(t)}
		srv, err := mesh.NewServer(mesh.Options{Redis: r.client(), Name: "web-1", Limits: mesh.Limits{RoomsPerConnection: -1}})
		require.NoError(t, err)
		r.srv, r.h = srv, meshdebug.NewHandler(srv, meshdebug.Options{})
		require.NoError(t, srv.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{TTL: time.Hour}))
		t.Cleanup(func() { shutdown(srv) })
		f(r)
	})
}

// onRealRedis returns a rig on a real Redis in real time, and another client of that
// Redis.
func onRealRedis(t *testing.T) (*rig, *redis.Client) {
	t.Helper()
	server := redistest.Start(t)
	srv, err := mesh.NewServer(mesh.Options{Redis: server.Client(t)})
	require.NoError(t, err)
	t.Cleanup(func() { shutdown(srv) })
	require.NoError(t, srv.Start(t.Context()))
	return &rig{t: t, srv: srv, h: meshdebug.NewHandler(srv, meshdebug.Options{})}, server.Client(t)
}

// page returns the page at an address. If a busy machine makes Redis too slow, it tries
// again.
func (r *rig) page(target string) string {
	r.t.Helper()
	w := r.get(target)
	for end := time.Now().Add(30 * time.Second); w.Code == http.StatusServiceUnavailable && time.Now().Before(end); {
		w = r.get(target)
	}
	require.Equal(r.t, http.StatusOK, w.Code, w.Body)
	return w.Body.String()
}

// shutdown has a time limit, because some tests have taken Redis away.
func shutdown(s interface{ Shutdown(context.Context) error }) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	_ = s.Shutdown(ctx)
}

func (r *rig) client() *redis.Client {
	c := r.mem.Client()
	r.t.Cleanup(func() { _ = c.Close() })
	return c
}

func (r *rig) start() {
	r.t.Helper()
	require.NoError(r.t, r.srv.Start(r.t.Context()))
}

// second starts another server on the same Redis. die cuts it off for good.
func (r *rig) second() (p *mesh.PresenceManager, die func()) {
	r.t.Helper()
	client := r.client()
	p, err := mesh.NewPresenceManager(mesh.Options{Redis: client, Name: "web-<2>"})
	require.NoError(r.t, err)
	r.t.Cleanup(func() { shutdown(p) })
	require.NoError(r.t, p.Start(r.t.Context()))
	return p, func() { _ = client.Close() }
}

// member connects a connection and joins it to a room.
func (r *rig) member(p *mesh.PresenceManager, room, conn string, metadata, state any) {
	r.t.Helper()
	require.NoError(r.t, p.Connect(r.t.Context(), conn, metadata))
	require.NoError(r.t, p.Join(r.t.Context(), room, conn))
	if state != nil {
		if err := p.TrackPresence(mesh.Exact(room), mesh.PresenceOptions{}); err != nil {
			require.NoError(r.t, err)
		}
		require.NoError(r.t, p.PublishState(r.t.Context(), room, conn, state, mesh.StateOptions{}))
	}
}

// watch makes the server watch rooms until the test ends.
func (r *rig) watch(rooms ...string) {
	r.t.Helper()
	for _, room := range rooms {
		require.NoError(r.t, r.srv.TrackPresence(mesh.Exact(room), mesh.PresenceOptions{}))
		go func() { // ends with the context of the test
			for range r.srv.Presence().Subscribe(r.t.Context(), room, mesh.SubscribeOptions{}) {
			}
		}()
	}
	time.Sleep(time.Second)
	synctest.Wait()
}

// get sends a request to the handler, with headers in pairs.
func (r *rig) get(target string, headers ...string) *httptest.ResponseRecorder {
	r.t.Helper()
	return ask(r.h, http.MethodGet, target, headers...)
}

func ask(h http.Handler, method, target string, headers ...string) *httptest.ResponseRecorder {
	req := httptest.NewRequest(method, target, nil)
	for i := 0; i+1 < len(headers); i += 2 {
		req.Header.Add(headers[i], headers[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, req)
	return w
}

// data requests JSON.
func (r *rig) data(query string, status int) (v answer) {
	r.t.Helper()
	w := r.get("/debug/mesh/?format=json&" + query)
	require.Equal(r.t, status, w.Code, w.Body)
	require.Equal(r.t, "application/json", w.Header().Get("Content-Type"))
	require.NoError(r.t, json.Unmarshal(w.Body.Bytes(), &v))
	return v
}

// answer is the JSON as the package documents it.
type answer struct {
	View    string
	Time    time.Time
	Ready   bool
	Servers *struct {
		Error string
		List  []struct {
			Incarnation      string
			Name             string
			Self             bool
			State            string
			LeaseLeftSeconds float64
			LeaseAgeSeconds  float64
			DeadForSeconds   float64
			Owned            int
		}
	}
	Connection *struct {
		Error                               string
		ID, Server, ServerName, ServerState string
		Known                               *bool
		Self, Hidden                        bool
		Metadata                            json.RawMessage
		Rooms                               []struct {
			Name  string
			Entry *struct {
				ConnectionID, ID, Server, ServerName string
				State                                json.RawMessage
			}
		}
	}
	Rooms *struct {
		Error string
		Total int
		List  []struct {
			Name    string
			Members int
			Tracked bool
		}
		Next string
	}
	Watched *struct {
		Error string
		Total int
		List  []struct {
			Name                   string
			Subscriptions, Members int
			Stale                  bool
			Epoch, RedisEpoch      string
			Seq, RedisSeq          uint64
			Behind                 *uint64
		}
		Next string
	}
	Room *struct {
		Error   string
		Name    string
		Epoch   string
		Seq     uint64
		Total   int
		Now     *time.Time
		Hidden  bool
		Entries []struct {
			ConnectionID, ID, Server, ServerState string
			ServerName                            string
			TTLSeconds                            float64
			Metadata, State                       json.RawMessage
		}
		Next string
	}
	Stats map[string]any
}

var href = regexp.MustCompile(`href="([^"]*)"`)

// links returns the links of a page, as a browser reads them.
func links(body string) (list []string) {
	for _, m := range href.FindAllStringSubmatch(body, -1) {
		list = append(list, html.UnescapeString(m[1]))
	}
	return list
}

// queryOf parses a relative link's query.
func queryOf(t *testing.T, link string) url.Values {
	t.Helper()
	u, err := url.Parse(link)
	require.NoError(t, err)
	require.Empty(t, u.Scheme+u.Host+u.Path, "a link that is not relative: %s", link)
	values, err := url.ParseQuery(u.RawQuery)
	require.NoError(t, err)
	return values
}

// stateOptions are the options of all states in the tests.
var stateOptions mesh.StateOptions

// trackAll tracks every room.
func (r *rig) trackAll() {
	r.t.Helper()
	require.NoError(r.t, r.srv.TrackPresence(mesh.Regexp(regexp.MustCompile(`(?s)^.*$`)), mesh.PresenceOptions{}))
}

// usable reports whether a room can have that name.
func usable(name string) bool {
	return name != "" && len(name) <= 256 && utf8.ValidString(name) && !strings.ContainsFunc(name, unicode.IsControl)
}
