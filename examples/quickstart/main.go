// Quickstart tells whoever subscribes to the room "lobby" who is in it.
package main

import (
	"context"
	"errors"
	"log"
	"log/slog"
	"net/http"
	"time"

	"github.com/meshpresence/mesh"
	"github.com/redis/go-redis/v9"
)

func main() {
	srv, err := mesh.NewServer(mesh.Options{
		Redis: redis.NewClient(&redis.Options{Addr: "localhost:6379"}), Logger: slog.Default(),
		Authenticate: func(_ context.Context, r *http.Request) (any, error) { // check r here; an error refuses the client
			return map[string]string{"userId": "user123", "username": "Alice"}, nil
		}})
	if err != nil {
		log.Fatal(err)
	}
	if err := errors.Join(srv.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{}), srv.Start(context.Background())); err != nil {
		log.Fatal(err)
	}
	http.Handle("/ws", srv)
	log.Fatal((&http.Server{Addr: "localhost:8080", ReadHeaderTimeout: 10 * time.Second, MaxHeaderBytes: 16 << 10}).ListenAndServe())
}
