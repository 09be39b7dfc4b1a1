package meshdebug_test

import (
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/meshdebug"
)

func TestOnlyReads(t *testing.T) {
	t.Parallel()
	inVirtualTime(t, func(r *rig) {
		r.start()
		for _, method := range []string{"POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "FOO"} {
			w := ask(r.h, method, "/debug/mesh/")
			assert.Equal(r.t, http.StatusMethodNotAllowed, w.Code, method)
			assert.Equal(r.t, "GET, HEAD", w.Header().Get("Allow"), method)
		}
		assert.Equal(r.t, http.StatusOK, ask(r.h, http.MethodHead, "/debug/mesh/").Code)
	})
}

// The page works on a Redis that refuses writes, because it writes nothing.
func TestNothingIsWritten(t *testing.T) {
	t.Parallel()
	r, admin := onRealRedis(t)
	require.NoError(t, r.srv.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{}))
	require.NoError(t, r.srv.Presence().Connect(t.Context(), "c", nil))
	require.NoError(t, r.srv.Presence().Join(t.Context(), "lobby", "c"))
	require.NoError(t, admin.ConfigSet(t.Context(), "min-replicas-to-write", "1").Err())
	require.ErrorContains(t, admin.Set(t.Context(), "x", "y", 0).Err(), "NOREPLICAS")
	for _, query := range []string{
		"", "view=rooms", "view=rooms&prefix=l", "view=watched", "room=lobby", "room=nowhere", "room=lobby&cursor=0.0.a", "conn=c",
	} {
		r.page("/?" + query)
	}
	require.ErrorContains(t, admin.Set(t.Context(), "x", "y", 0).Err(), "NOREPLICAS")
	require.NoError(t, admin.ConfigSet(t.Context(), "min-replicas-to-write", "0").Err())
}

func TestHeaders(t *testing.T) {
	t.Parallel()
	inVirtualTime(t, func(r *rig) {
		r.start()
		for _, target := range []string{"/", "/?format=json", "/?room=lobby", "/?format=x", "/?room="} {
			w := r.get(target)
			h := w.Header()
			assert.Equal(r.t, "nosniff", h.Get("X-Content-Type-Options"))
			assert.Equal(r.t, "no-store", h.Get("Cache-Control"))
			assert.Equal(r.t, "no-referrer", h.Get("Referrer-Policy"))
			assert.Equal(r.t, "DENY", h.Get("X-Frame-Options"))
			assert.Empty(r.t, h.Get("Access-Control-Allow-Origin"))
			policy := h.Get("Content-Security-Policy")
			assert.Contains(r.t, policy, "default-src 'none';")
			assert.Contains(r.t, policy, "frame-ancestors 'none'")
			assert.NotContains(r.t, policy, "unsafe")
			assert.NotContains(r.t, policy, "script")
		}
		w := r.get("/")
		assert.Equal(r.t, "text/html; charset=utf-8", w.Header().Get("Content-Type"))
		body := w.Body.String()
		_, rest, _ := strings.Cut(body, "<style>")
		style, _, ok := strings.Cut(rest, "</style>")
		require.True(r.t, ok)
		sum := sha256.Sum256([]byte(style))
		assert.Contains(r.t, w.Header().Get("Content-Security-Policy"), "style-src 'sha256-"+base64.StdEncoding.EncodeToString(sum[:])+"';",
			"the hash allows the style")
		for _, foreign := range []string{"<script", "http://", "https://", "//", " style=", " onload", "@import", "url("} {
			assert.NotContains(r.t, body, foreign, "the page loads nothing")
		}
	})
}

func TestForms(t *testing.T) {
	t.Parallel()
	inVirtualTime(t, func(r *rig) {
		r.start()
		for _, c := range []struct {
			query, accept string
			json          bool
		}{
			{"", "", false},
			{"", "*/*", false},
			{"", "application/json", true},
			{"", "application/json, text/plain, */*", true},
			{"", "Application/JSON;q=0.9", true},
			{"", "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", false},
			{"", "application/json, text/html", false},
			{"format=json", "text/html", true},
			{"format=html", "application/json", false},
		} {
			w := r.get("/?"+c.query, "Accept", c.accept)
			assert.Equal(r.t, http.StatusOK, w.Code)
			assert.Equal(r.t, c.json, w.Header().Get("Content-Type") == "application/json", "%+v", c)
			assert.Equal(r.t, "Accept", w.Header().Get("Vary"))
		}
	})
}

func TestInvalidQueries(t *testing.T) {
	t.Parallel()
	inVirtualTime(t, func(r *rig) {
		r.start()
		for _, query := range []string{
			"view=x", "view=room", "format=xml", "refresh=0", "refresh=-1", "refresh=x", "refresh=3601", "limit=0", "limit=1001", "limit=1e2",
			"%zz", "room=%", "room=", "room=a%00b", "room=%ff", "room=" + strings.Repeat("a", 257), "view=rooms&cursor=x", "room=lobby&cursor=9.9.",
			"conn=", "conn=a%00b", "conn=a:b", "conn=a%20b", "conn=%ff", "conn=" + strings.Repeat("a", 129), "conn=c&room=lobby",
		} {
			assert.Equal(r.t, http.StatusBadRequest, r.get("/?"+query).Code, query)
			assert.Equal(r.t, http.StatusBadRequest, r.get("/?"+query, "Accept", "application/json").Code, query)
		}
		assert.Equal(r.t, http.StatusOK, r.get("/?utm=1&view=").Code, "unknown keys are ignored")
	})
}

func TestRefresh(t *testing.T) {
	t.Parallel()
	inVirtualTime(t, func(r *rig) {
		r.start()
		r.member(r.srv.Presence(), "lobby", "c", nil, nil)
		assert.NotContains(r.t, r.get("/").Body.String(), "http-equiv")
		body := r.get("/?view=rooms&prefix=lo&limit=7&refresh=30").Body.String()
		assert.Contains(r.t, body, `<meta http-equiv="refresh" content="30">`)
		for _, link := range links(body) {
			if strings.HasPrefix(link, "data:") {
				continue
			}
			q := queryOf(r.t, link)
			if q.Get("prefix") != "" && !q.Has("format") {
				assert.Equal(r.t, "prefix=lo", "prefix="+q.Get("prefix"))
				assert.Equal(r.t, "7", q.Get("limit"))
				assert.False(r.t, q.Has("refresh"), "the link that stops the refresh")
				continue
			}
			assert.Equal(r.t, "30", q.Get("refresh"), link)
		}
	})
}

// The handler ignores the path that it is mounted at, and its links lead back to it.
func TestMountedAnywhere(t *testing.T) {
	t.Parallel()
	inVirtualTime(t, func(r *rig) {
		r.start()
		r.member(r.srv.Presence(), "a/b", "c", nil, nil)
		mux := http.NewServeMux()
		mux.Handle("/debug/mesh/", r.h)
		mux.Handle("/bare", r.h)
		mux.Handle("/cut/", http.StripPrefix("/cut", r.h))
		for _, at := range []string{"/debug/mesh/", "/bare", "/cut/"} {
			w := ask(mux, http.MethodGet, at)
			assert.Equal(r.t, http.StatusOK, w.Code)
			found := false
			for _, link := range links(w.Body.String()) {
				if strings.HasPrefix(link, "data:") {
					continue
				}
				if q := queryOf(r.t, link); q.Get("room") == "a/b" {
					found = true
					page := ask(mux, http.MethodGet, at+link)
					assert.Equal(r.t, http.StatusOK, page.Code)
					assert.Contains(r.t, page.Body.String(), "<h1><bdi>a/b</bdi></h1>")
				}
			}
			assert.True(r.t, found)
		}
	})
}

func TestTooManyAtOnce(t *testing.T) {
	t.Parallel()
	inVirtualTime(t, func(r *rig) {
		r.start()
		r.mem.Hang()
		var asked sync.WaitGroup
		for range 8 {
			asked.Go(func() { assert.Contains(r.t, r.get("/").Body.String(), "Redis does not answer") })
		}
		synctest.Wait()
		w := r.get("/")
		assert.Equal(r.t, http.StatusServiceUnavailable, w.Code)
		assert.Equal(r.t, "1", w.Header().Get("Retry-After"))
		assert.Equal(r.t, "too many requests at once\n", w.Body.String())
		asked.Wait()
		r.mem.Resume()
		time.Sleep(20 * time.Second)
		assert.Equal(r.t, http.StatusOK, r.get("/").Code, "slots are freed")
	})
}

// slowClient accepts no data until read is closed.
type slowClient struct {
	*httptest.ResponseRecorder
	read <-chan struct{}
}

func (c slowClient) Write(b []byte) (int, error) {
	<-c.read
	return c.ResponseRecorder.Write(b)
}

func TestSlowClientsBlockNoOthers(t *testing.T) {
	t.Parallel()
	inVirtualTime(t, func(r *rig) {
		r.start()
		read := make(chan struct{})
		var slow sync.WaitGroup
		for i := range 16 {
			slow.Go(func() {
				c := slowClient{httptest.NewRecorder(), read}
				r.h.ServeHTTP(c, httptest.NewRequestWithContext(r.t.Context(), http.MethodGet, "/", nil))
				assert.Equal(r.t, http.StatusOK, c.Code, i)
				assert.Contains(r.t, c.Body.String(), "</html>")
			})
			synctest.Wait() // it has its page, and does not read it
		}
		assert.Equal(r.t, http.StatusOK, r.get("/").Code)
		close(read)
		slow.Wait()
	})
}

func TestNilSource(t *testing.T) {
	t.Parallel()
	assert.PanicsWithValue(t, "meshdebug: nil Source", func() { meshdebug.NewHandler(nil, meshdebug.Options{}) })
}

// A PresenceManager is shown like a server.
func TestPresenceManagerAsSource(t *testing.T) {
	t.Parallel()
	inVirtualTime(t, func(r *rig) {
		p, _ := r.second()
		w := ask(meshdebug.NewHandler(p, meshdebug.Options{}), http.MethodGet, "/")
		assert.Equal(r.t, http.StatusOK, w.Code)
		assert.Contains(r.t, w.Body.String(), fmt.Sprintf(`title="%s"`, p.Stats().Incarnation))
	})
}
