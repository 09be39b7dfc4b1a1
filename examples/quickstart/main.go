// Quickstart shows the subscribers of the room "lobby" which connections are in it.
package main

import (
	"context"
	"log"
	"log/slog"
	"net/http"
	"time"

	"github.com/meshpresence/mesh"
	"github.com/redis/go-redis/v9"
)

func main() {
	srv, err := mesh.NewServer(mesh.Options{
		Redis:  redis.NewClient(&redis.Options{Addr: "localhost:6379"}),
		Logger: slog.Default(),
		Authenticate: func(_ context.Context, r *http.Request) (any, error) {
			// Check r here. An error refuses the client.
			return map[string]string{"userId": "user123", "username": "Alice"}, nil
		},
	})
	if err != nil {
		log.Fatal(err)
	}
	if err := srv.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{}); err != nil {
		log.Fatal(err)
	}
	if err := srv.Start(context.Background()); err != nil {
		log.Fatal(err)
	}

	http.Handle("/ws", srv)
	web := &http.Server{
		Addr:              "localhost:8080",
		ReadHeaderTimeout: 10 * time.Second,
		MaxHeaderBytes:    16 << 10,
	}
	log.Fatal(web.ListenAndServe())
}
