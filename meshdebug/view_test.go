package meshdebug_test

import (
	"fmt"
	"html"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/meshdebug"
)

// golden compares the text with a file, without the parts that are random or depend on
// the time. To write the files: MESH_GOLDEN=1 go test ./meshdebug.
func (r *rig) golden(name, body string, names map[string]string) {
	r.t.Helper()
	for secret, name := range names {
		body = strings.ReplaceAll(body, secret, name)
	}
	body = regexp.MustCompile(`"(epoch|redisEpoch|id)": "[^"]+"`).ReplaceAllString(body, `"$1": "…"`)
	body = regexp.MustCompile(`"lease(Left|Age)Seconds": [0-9.]+`).ReplaceAllString(body, `"lease${1}Seconds": …`)
	body = regexp.MustCompile(`"(time|now|joinedAt)": "2000-01-01T00:00:[0-9.]+Z"`).ReplaceAllString(body, `"$1": "…"`)
	if _, rest, ok := strings.Cut(body, `"stats": {`); ok { // only the presence of stats is compared
		inner, _, _ := strings.Cut(rest, "\n  }")
		body = strings.Replace(body, inner, " … ", 1)
	}
	path := filepath.Join("testdata", name)
	if os.Getenv("MESH_GOLDEN") != "" {
		require.NoError(r.t, os.WriteFile(path, []byte(body), 0o644))
	}
	want, err := os.ReadFile(path)
	require.NoError(r.t, err)
	assert.Equal(r.t, string(want), body, name)
}

func TestShapeOfJSON(t *testing.T) {
	t.Parallel()
	inVirtualTime(t, func(r *rig) {
		r.start()
		p, _ := r.second()
		r.member(r.srv.Presence(), "lobby", "ann", map[string]any{"name": "Ann <b>"}, map[string]any{"typing": true})
		r.member(p, "lobby", "bob", nil, nil)
		r.member(p, "attic", "cy", nil, nil)
		r.watch("lobby")
		names := map[string]string{r.srv.Stats().Incarnation: "SELF", p.Stats().Incarnation: "OTHER"}
		for name, query := range map[string]string{
			"overview.json": "", "rooms.json": "view=rooms&prefix=at", "watched.json": "view=watched", "room.json": "room=lobby",
			"connection.json": "conn=ann",
		} {
			w := r.get("/?format=json&" + query)
			require.Equal(r.t, http.StatusOK, w.Code)
			r.golden(name, w.Body.String(), names)
		}
	})
}

func TestStatsAreThere(t *testing.T) {
	t.Parallel()
	inVirtualTime(t, func(r *rig) {
		r.start()
		r.member(r.srv.Presence(), "lobby", "ann", nil, nil)
		stats := r.data("", http.StatusOK).Stats
		assert.EqualValues(r.t, 1, stats["connections"])
		assert.EqualValues(r.t, 1, stats["entries"])
		assert.Equal(r.t, r.srv.Stats().Incarnation, stats["incarnation"])
		assert.Contains(r.t, stats, "leaseAgeSeconds")
		assert.Contains(r.t, stats, "redisCalls")
		assert.Nil(r.t, r.data("view=rooms", http.StatusOK).Stats)
	})
}

// One of two servers is killed. Its lease runs out, it is shown as lapsed or dead, and
// then it is gone with all of its entries.
func TestDyingServer(t *testing.T) {
	t.Parallel()
	inVirtualTime(t, func(r *rig) {
		r.start()
		p, die := r.second()
		inc := p.Stats().Incarnation
		for i := range 3 {
			r.member(p, "lobby", fmt.Sprint("c", i), nil, nil)
		}
		time.Sleep(12 * time.Second) // from now on the server may declare others dead
		state := func() string {
			for _, s := range r.data("", http.StatusOK).Servers.List {
				if s.Incarnation == inc {
					assert.Equal(r.t, 6, s.Owned)
					assert.InDelta(r.t, 10, s.LeaseLeftSeconds+s.LeaseAgeSeconds, .002)
					return s.State
				}
			}
			return "gone"
		}
		require.Equal(r.t, "living", state())
		room := r.data("room=lobby", http.StatusOK).Room
		require.Len(r.t, room.Entries, 3)
		assert.Equal(r.t, "living", room.Entries[0].ServerState)
		die()
		died := time.Now()
		seen := []string{"living"}
		for seen[len(seen)-1] != "gone" {
			require.Less(r.t, time.Since(died), 12*time.Second, "%v", seen)
			time.Sleep(50 * time.Millisecond)
			if s := state(); s != seen[len(seen)-1] {
				seen = append(seen, s)
			}
		}
		assert.Contains(r.t, []string{"living lapsed gone", "living lapsed dead gone"}, strings.Join(seen, " "))
		assert.Zero(r.t, r.data("room=lobby", http.StatusOK).Room.Total)
	})
}

// An entry whose server is unknown is shown as such.
func TestEntryOfAnUnknownServer(t *testing.T) {
	t.Parallel()
	inVirtualTime(t, func(r *rig) {
		r.start()
		r.member(r.srv.Presence(), "lobby", "ann", nil, nil)
		c := r.client()
		record, err := c.HGet(r.t.Context(), "mesh:presence:members:lobby", "ann").Result()
		require.NoError(r.t, err)
		fields := strings.SplitN(record, " ", 5)
		fields[1], fields[3] = "nobody", strconv.Itoa(len("not JSON")) // its server, and the length of its state
		record = strings.Join(fields, " ")
		require.NoError(r.t, c.HSet(r.t.Context(), "mesh:presence:members:lobby", "old", record+"not JSON").Err())
		for _, e := range r.data("room=lobby", http.StatusOK).Room.Entries {
			if e.ConnectionID == "old" {
				assert.Equal(r.t, "unknown", e.ServerState)
				assert.Equal(r.t, `"not JSON"`, string(e.State))
			} else {
				assert.Equal(r.t, "living", e.ServerState)
			}
		}
		body := r.get("/?room=lobby").Body.String()
		assert.Contains(r.t, body, `<span class="mark">unknown</span>`)
		assert.Contains(r.t, body, "this server")
	})
}

var (
	more  = regexp.MustCompile(`<a href="([^"]*)">More [a-z]+</a>`)
	items = regexp.MustCompile(`<a [^>]*><bdi>(room-\d+)</bdi>|<code title="entry e">(c\d+)</code>`)
)

// 10,000 rooms, and 3,000 members of one room, come in pages of limited size that lead to
// each other.
func TestPaging(t *testing.T) {
	t.Parallel()
	r, c := onRealRedis(t)
	for part := range 10 {
		var names []any
		pipe := c.Pipeline()
		for i := range 1000 {
			name := fmt.Sprintf("room-%05d", 1000*part+i)
			names = append(names, name)
			pipe.HSet(t.Context(), "mesh:presence:members:"+name, "c", "e i 0 0 0 . 0 0 0 1 1\n")
		}
		pipe.SAdd(t.Context(), "mesh:presence:rooms", names...)
		for i := range 300 {
			pipe.HSet(t.Context(), "mesh:presence:members:big", fmt.Sprintf("c%04d", 300*part+i), "e i 0 0 0 . 0 0 0 1 1\n")
		}
		_, err := pipe.Exec(t.Context())
		require.NoError(t, err)
	}
	assert.Less(t, len(r.page("/")), 64<<10)
	for first, want := range map[string]int{"?view=rooms&limit=500": 10_000, "?room=big&limit=500": 3000} {
		seen, pages := make(map[string]bool), 0
		for link := first; link != ""; pages++ {
			body := r.page("/" + link)
			require.Less(t, len(body), 512<<10)
			for _, m := range items.FindAllStringSubmatch(body, -1) {
				seen[m[1]+m[2]] = true
			}
			link = ""
			if m := more.FindStringSubmatch(body); m != nil {
				link = html.UnescapeString(m[1])
			}
		}
		assert.Len(t, seen, want)
		assert.GreaterOrEqual(t, pages, want/1000)
	}
	found := make(map[string]bool)
	for link := "?view=rooms&prefix=room-0999"; link != ""; {
		body := r.page("/" + link)
		assert.Contains(t, body, "10\u202f000 with members")
		for _, m := range items.FindAllStringSubmatch(body, -1) {
			found[m[1]] = true
		}
		link = ""
		if m := more.FindStringSubmatch(body); m != nil {
			link = html.UnescapeString(m[1])
		}
	}
	assert.Len(t, found, 10)
}

func TestPagingOfWatchedRooms(t *testing.T) {
	t.Parallel()
	inVirtualTime(t, func(r *rig) {
		r.start()
		var rooms []string
		for i := range 25 {
			rooms = append(rooms, fmt.Sprintf("r%02d", i))
		}
		r.watch(rooms...)
		page := r.data("view=watched&limit=10", http.StatusOK).Watched
		assert.Equal(r.t, 25, page.Total)
		require.Len(r.t, page.List, 10)
		page = r.data("view=watched&limit=10&after="+page.Next, http.StatusOK).Watched
		require.Len(r.t, page.List, 10)
		assert.Equal(r.t, "r10", page.List[0].Name)
		page = r.data("view=watched&stale=1", http.StatusOK).Watched
		assert.Empty(r.t, page.List)
		body := r.get("/?view=watched&prefix=r1&limit=4").Body.String()
		assert.Equal(r.t, 4, strings.Count(body, `<span class="mark good">in step</span>`))
		assert.Contains(r.t, body, "10 rooms")
		assert.Contains(r.t, body, "after=r13")
	})
}

// The page shows how far this server's copy is behind Redis.
func TestLag(t *testing.T) {
	t.Parallel()
	inVirtualTime(t, func(r *rig) {
		r.start()
		r.member(r.srv.Presence(), "lobby", "ann", nil, nil)
		r.watch("lobby")
		at, err := r.client().Get(r.t.Context(), "mesh:presence:seq:lobby").Result()
		require.NoError(r.t, err)
		var epoch, tag string
		var seq int
		_, err = fmt.Sscan(at, &epoch, &seq, &tag)
		require.NoError(r.t, err)
		at = fmt.Sprintf("%s %d %s", epoch, seq+1234, tag)
		require.NoError(r.t, r.client().Set(r.t.Context(), "mesh:presence:seq:lobby", at, 0).Err())
		for _, query := range []string{"", "view=watched", "room=lobby"} {
			w := r.data(query, http.StatusOK).Watched
			require.Len(r.t, w.List, 1)
			require.NotNil(r.t, w.List[0].Behind)
			assert.EqualValues(r.t, 1234, *w.List[0].Behind)
			assert.Equal(r.t, w.List[0].Seq+1234, w.List[0].RedisSeq)
			body := r.get("/?" + query).Body.String()
			assert.Contains(r.t, body, `<span class="mark warn">behind</span>`)
			assert.Contains(r.t, body, "1\u202f234")
		}
	})
}

// If Redis does not answer, the status is 503 and the page shows the data of this server.
func TestRedisAway(t *testing.T) {
	t.Parallel()
	for _, fault := range []string{"cut", "hangs"} {
		t.Run(fault, func(t *testing.T) {
			t.Parallel()
			inVirtualTime(t, func(r *rig) {
				r.start()
				r.member(r.srv.Presence(), "lobby", "ann", nil, nil)
				r.watch("lobby")
				if fault == "cut" {
					r.mem.Cut()
				} else {
					r.mem.Hang()
				}
				time.Sleep(5 * time.Second)
				for _, query := range []string{"", "view=rooms", "view=watched", "room=lobby"} {
					began := time.Now()
					v := r.data(query, http.StatusServiceUnavailable)
					assert.LessOrEqual(r.t, time.Since(began), 2*time.Second, query)
					w := r.get("/?" + query)
					assert.Equal(r.t, http.StatusServiceUnavailable, w.Code)
					assert.Contains(r.t, w.Body.String(), "Redis does not answer")
					switch query {
					case "":
						assert.NotEmpty(r.t, v.Servers.Error)
						assert.NotEmpty(r.t, v.Rooms.Error)
						assert.EqualValues(r.t, 1, v.Stats["connections"])
						assert.EqualValues(r.t, 1, v.Stats["stale"])
						fallthrough
					case "view=watched":
						assert.NotEmpty(r.t, v.Watched.Error)
						require.Len(r.t, v.Watched.List, 1)
						assert.True(r.t, v.Watched.List[0].Stale)
						assert.Nil(r.t, v.Watched.List[0].Behind)
						assert.Equal(r.t, 1, v.Watched.List[0].Members)
						assert.Contains(r.t, w.Body.String(), `<span class="mark warn">stale</span>`)
					case "room=lobby":
						assert.NotEmpty(r.t, v.Room.Error)
						assert.Nil(r.t, v.Room.Now)
						require.Len(r.t, v.Watched.List, 1)
					}
				}
				r.mem.Heal()
				r.mem.Resume()
				time.Sleep(20 * time.Second)
				assert.Equal(r.t, http.StatusOK, r.get("/").Code)
			})
		})
	}
}

// A server that was not started, or was shut down, says so on its page.
func TestServerThatDoesNotRun(t *testing.T) {
	t.Parallel()
	inVirtualTime(t, func(r *rig) {
		for _, query := range []string{"", "view=rooms", "room=lobby"} {
			assert.Contains(r.t, r.get("/?"+query).Body.String(), "has not been started")
			r.data(query, http.StatusServiceUnavailable)
		}
		assert.False(r.t, r.data("", http.StatusServiceUnavailable).Ready)
		r.start()
		assert.True(r.t, r.data("", http.StatusOK).Ready)
		require.NoError(r.t, r.srv.Shutdown(r.t.Context()))
		for _, query := range []string{"", "view=rooms", "room=lobby"} {
			assert.Contains(r.t, r.get("/?"+query).Body.String(), "has been shut down")
			r.data(query, http.StatusServiceUnavailable)
		}
	})
}

func TestHidingData(t *testing.T) {
	t.Parallel()
	inVirtualTime(t, func(r *rig) {
		r.start()
		r.member(r.srv.Presence(), "lobby", "ann", map[string]any{"name": "secret-1"}, map[string]any{"at": "secret-2"})
		r.h = meshdebug.NewHandler(r.srv, meshdebug.Options{})
		for _, query := range []string{"room=lobby", "room=lobby&format=json"} {
			body := r.get("/?" + query).Body.String()
			assert.Contains(r.t, body, "secret-1")
			assert.Contains(r.t, body, "secret-2")
		}
		r.h = meshdebug.NewHandler(r.srv, meshdebug.Options{HideData: true})
		for _, query := range []string{"room=lobby", "room=lobby&format=json", "", "format=json"} {
			body := r.get("/?" + query).Body.String()
			assert.NotContains(r.t, body, "secret")
		}
		assert.True(r.t, r.data("room=lobby", http.StatusOK).Room.Hidden)
		assert.Contains(r.t, r.get("/?room=lobby").Body.String(), "metadata and states are not shown")
	})
}
