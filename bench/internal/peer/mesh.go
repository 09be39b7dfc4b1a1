package peer

import (
	"context"
	"net/http"
	"regexp"
	"sync"
	"time"

	"github.com/gorilla/websocket"
	"github.com/redis/go-redis/v9"

	"github.com/meshpresence/mesh"
)

// person is the metadata of every connection.
var person = map[string]string{"userId": "user-4711", "name": "Ada Lovelace", "avatar": "https://example.com/a/4711.png"}

func startMesh(ctx context.Context, cfg Config) (http.Handler, func(context.Context) error, error) {
	client := redis.NewClient(&redis.Options{Addr: cfg.Redis})
	srv, err := mesh.NewServer(mesh.Options{
		Redis: client, PingInterval: time.Hour, LatencyInterval: -1,
		Authenticate: func(context.Context, *http.Request) (any, error) { return person, nil },
		Limits: mesh.Limits{
			CommandsPerSecond: -1, UpgradesPerSecond: -1, RoomsPerConnection: -1, NewRoomsPerMinute: -1,
			SnapshotMembers: cfg.SnapshotMembers,
		},
	})
	if err != nil {
		return nil, nil, err
	}
	if err := srv.TrackPresence(mesh.Regexp(regexp.MustCompile(".*")), mesh.PresenceOptions{StateInterval: cfg.StateInterval}); err != nil {
		return nil, nil, err
	}
	if err := srv.Start(ctx); err != nil {
		return nil, nil, err
	}
	stop := func(ctx context.Context) error {
		err := srv.Shutdown(ctx)
		_ = client.Close()
		return err
	}
	if cfg.Kind == Mesh {
		return srv, stop, nil
	}
	up := websocket.Upgrader{ReadBufferSize: 512, WriteBufferPool: &sync.Pool{}}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ws, err := up.Upgrade(w, r, nil)
		if err != nil {
			return
		}
		opts := mesh.ConnOptions{Metadata: person}
		if cfg.Kind == MeshGo {
			ctx := context.WithoutCancel(r.Context())
			go func() { _ = srv.ServeConn(ctx, ws, opts) }() // ends with the connection; Shutdown waits for it
			return
		}
		_ = srv.ServeConn(r.Context(), ws, opts)
	}), stop, nil
}
